//! Target types by their usual names, and what a person may wish to have otherwise.

use regex::Regex;
use rushlight_models::checkpoint::Checkpoint;
use rushlight_quant::formats::Format;

/// What `--type` takes: a mix with its default format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Its usual name, such as `Q4_K_M`.
    pub name: &'static str,
    /// The format of tensors for which the mix has no other.
    pub format: Format,
    /// GGUF's `general.file_type`.
    pub file_type: u32,
}

const fn target(name: &'static str, format: Format, file_type: u32) -> Target {
    Target { name, format, file_type }
}

impl Target {
    /// Every target, from the largest to the smallest.
    pub const ALL: [Target; 21] = [
        target("F32", Format::F32, 0),
        target("F16", Format::F16, 1),
        target("BF16", Format::BF16, 32),
        target("Q8_0", Format::Q8_0, 7),
        target("Q6_K", Format::Q6_K, 18),
        target("Q5_1", Format::Q5_1, 9),
        target("Q5_0", Format::Q5_0, 8),
        target("Q5_K_M", Format::Q5_K, 17),
        target("Q5_K_S", Format::Q5_K, 16),
        target("Q4_1", Format::Q4_1, 3),
        target("Q4_K_M", Format::Q4_K, 15),
        target("Q4_K_S", Format::Q4_K, 14),
        target("Q4_0", Format::Q4_0, 2),
        target("IQ4_NL", Format::IQ4_NL, 25),
        target("IQ4_XS", Format::IQ4_XS, 30),
        target("MXFP4_MOE", Format::MXFP4, 38),
        target("Q3_K_L", Format::Q3_K, 13),
        target("Q3_K_M", Format::Q3_K, 12),
        target("Q3_K_S", Format::Q3_K, 11),
        target("Q2_K", Format::Q2_K, 10),
        target("Q2_K_S", Format::Q2_K, 21),
    ];

    /// The target where nothing else is known.
    pub const DEFAULT: Target = target("Q4_K_M", Format::Q4_K, 15);

    /// The target that keeps the codes that another tool has chosen (GPTQ, AWQ, LLM.int8, MXFP4), where that is what most
    /// weights of a checkpoint are.
    pub fn natural(checkpoint: &Checkpoint) -> Option<Target> {
        let (mut all, mut kept) = (0, [("Q4_0", 0), ("Q4_1", 0), ("Q8_0", 0), ("MXFP4_MOE", 0)]);
        for info in checkpoint.tensors() {
            // What looks words up or scores them says nothing of how the rest was made.
            let words = info.name.contains("embed") || info.name.contains("lm_head");
            let elements = if words { 0 } else { info.elements().unwrap_or(0) };
            all += elements;
            let own = match info.format {
                Format::Q4_0 => 0,
                Format::Q4_Z => 1,
                Format::Q8_0 | Format::Q8_F => 2,
                Format::MXFP4 => 3,
                _ => continue,
            };
            if checkpoint.metadata().is_none() && checkpoint.column_order(&info.name).is_none() {
                kept[own].1 += elements;
            }
        }
        let (name, most) = kept.into_iter().max_by_key(|(_, n)| *n)?;
        Target::ALL.into_iter().find(|t| t.name == name).filter(|_| most > all / 2)
    }

    /// No mix with a name: each tensor's format is chosen by what it costs.
    pub const MIX: Target = target("MIX", Format::Q8_0, 7);

    /// The target called `name`, in capitals or not. `Q3_K`, `Q4_K` and `Q5_K` are the mixes of medium size, `MXFP4` is
    /// the one for experts.
    pub fn parse(name: &str) -> Result<Target, String> {
        let upper = name.to_ascii_uppercase();
        let full = match upper.as_str() {
            "Q3_K" | "Q4_K" | "Q5_K" => format!("{upper}_M"),
            "MXFP4" => "MXFP4_MOE".into(),
            _ => upper,
        };
        Target::ALL.into_iter().find(|t| t.name == full).ok_or_else(|| {
            let names: Vec<&str> = Target::ALL.iter().map(|t| t.name).collect();
            format!("there is no type '{}'; the types are {}", name.escape_debug(), names.join(" "))
        })
    }
}

/// The formats that tensors can be written in.
pub const FORMATS: [Format; 16] = [
    Format::F32,
    Format::F16,
    Format::BF16,
    Format::Q8_0,
    Format::Q6_K,
    Format::Q5_1,
    Format::Q5_0,
    Format::Q5_K,
    Format::Q4_1,
    Format::Q4_0,
    Format::Q4_K,
    Format::IQ4_NL,
    Format::IQ4_XS,
    Format::MXFP4,
    Format::Q3_K,
    Format::Q2_K,
];

/// The format of [`FORMATS`] called `name`, in capitals or not.
pub fn parse_format(name: &str) -> Result<Format, String> {
    FORMATS.into_iter().find(|f| f.name().eq_ignore_ascii_case(name)).ok_or_else(|| {
        let names: Vec<&str> = FORMATS.iter().map(|f| f.name()).collect();
        format!("there is no format '{}'; the formats are {}", name.escape_debug(), names.join(" "))
    })
}

/// A `PATTERN=FORMAT` of `--keep`: tensors whose GGUF name the regular expression finds get the format.
#[derive(Clone, Debug)]
pub struct Keep {
    /// Looked for anywhere in the name.
    pub pattern: Regex,
    /// What they get.
    pub format: Format,
}

impl Keep {
    /// Reads `PATTERN=FORMAT`.
    pub fn parse(text: &str) -> Result<Keep, String> {
        let (pattern, format) = text.rsplit_once('=').ok_or("give PATTERN=FORMAT, such as 'ffn_down=Q6_K'")?;
        let pattern = Regex::new(pattern).map_err(|e| format!("'{pattern}' is not a regular expression: {e}"))?;
        Ok(Keep { pattern, format: parse_format(format)? })
    }
}

/// What departs from a target's own choices.
#[derive(Clone, Debug, Default)]
pub struct Wishes {
    /// The first that fits decides, before anything else does.
    pub keep: Vec<Keep>,
    /// For `output.weight` (and, where a model has none, for the embedding that serves as one).
    pub output: Option<Format>,
    /// For `token_embd.weight`.
    pub embedding: Option<Format>,
    /// The target's format for every tensor that can have it.
    pub pure: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(Target::parse("q3_k").unwrap().name, "Q3_K_M");
        assert_eq!(Target::parse("Q4_k_s").unwrap().file_type, 14);
        assert!(Target::parse("Q9\n").unwrap_err().contains("'Q9\\n'; the types are F32 F16"));
        assert!(parse_format("Q4_K_M").unwrap_err().contains("the formats are"));
        assert!(Keep::parse("a(=F16").unwrap_err().contains("regular expression"));
        assert!(Keep::parse("F16").unwrap_err().contains("PATTERN=FORMAT"));
        for target in Target::ALL {
            assert_eq!(Target::parse(target.name), Ok(target));
        }
    }
}
