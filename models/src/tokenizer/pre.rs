//! The names of `tokenizer.ggml.pre`, and the patterns each stands for.

use super::words::Words;

/// How a family of byte-level vocabularies cuts text into words before any merging.
pub struct Pre {
    /// The names it goes by.
    names: &'static [&'static str],
    /// Patterns, each applied to every piece that the ones before it left: a match is a piece, and so is what lies
    /// between matches.
    pub patterns: &'static [&'static str],
    /// Whether a word that is a token is taken whole.
    pub whole_words: bool,
    /// Whether a text begins with the beginning-of-text token where the file does not say.
    pub add_bos: bool,
    /// Whether text is composed (Unicode NFC) first.
    pub compose: bool,
}

impl Pre {
    /// The best-known of its names.
    pub fn name(&self) -> &'static str {
        self.names.first().copied().unwrap_or("default")
    }
}

/// The pattern of GPT-2.
pub const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// The tiktoken pattern with digits in threes, as Llama 3 has it.
pub const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The same with digits one by one, as Qwen has it.
pub const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK3: &str =
    r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The letters with case of one version of Unicode; spelled by number, since some fold together when composed.
const DEEPSEEK_LETTERS: &str = r"\s?[A-Za-z\x{B5}\x{C0}-\x{D6}\x{D8}-\x{F6}\x{F8}-\x{1BA}\x{1BC}-\x{1BF}\x{1C4}-\x{293}\x{295}-\x{2AF}\x{370}-\x{373}\x{376}\x{377}\x{37B}-\x{37D}\x{37F}\x{386}\x{388}-\x{38A}\x{38C}\x{38E}-\x{3A1}\x{3A3}-\x{3F5}\x{3F7}-\x{481}\x{48A}-\x{52F}\x{531}-\x{556}\x{10A0}-\x{10C5}\x{13A0}-\x{13F5}\x{13F8}-\x{13FD}\x{1C90}-\x{1CBA}\x{1CBD}-\x{1CBF}\x{1D00}-\x{1D2B}\x{1D6B}-\x{1D77}\x{1D79}-\x{1D9A}\x{1E00}-\x{1F15}\x{1F18}-\x{1F1D}\x{1F20}-\x{1F45}\x{1F48}-\x{1F4D}\x{1F50}-\x{1F57}\x{1F59}\x{1F5B}\x{1F5D}\x{1F5F}-\x{1F7D}\x{1F80}-\x{1FB4}\x{1FB6}-\x{1FBC}\x{1FBE}\x{1FC2}-\x{1FC4}\x{1FC6}-\x{1FCC}\x{1FD0}-\x{1FD3}\x{1FD6}-\x{1FDB}\x{1FE0}-\x{1FEC}\x{1FF2}-\x{1FF4}\x{1FF6}-\x{1FFC}\x{2102}\x{2107}\x{210A}-\x{2113}\x{2115}\x{2119}-\x{211D}\x{2124}\x{2126}\x{2128}\x{212A}-\x{212D}\x{212F}-\x{2134}\x{2139}\x{213C}-\x{213F}\x{2145}-\x{2149}\x{214E}\x{2183}\x{2184}\x{2C00}-\x{2C7B}\x{2C7E}-\x{2CE4}\x{2CEB}-\x{2CEE}\x{2CF2}\x{2CF3}\x{A640}-\x{A66D}\x{A680}-\x{A69B}\x{A722}-\x{A76F}\x{A771}-\x{A787}\x{A78B}-\x{A78E}\x{AB70}-\x{ABBF}\x{FB00}-\x{FB06}\x{FB13}-\x{FB17}\x{FF21}-\x{FF3A}\x{FF41}-\x{FF5A}\x{10400}-\x{1044F}\x{104B0}-\x{104D3}\x{104D8}-\x{104FB}\x{10C80}-\x{10CB2}\x{10CC0}-\x{10CF2}\x{118A0}-\x{118DF}\x{1E900}-\x{1E943}]+";
const CJK: &str = r"[\x{4E00}-\x{9FA5}\x{800}-\x{4E00}\x{AC00}-\x{D7FF}]+";
const PORO: &str = r" ?[^(\s|.,!?\x{2026}\x{3002}\x{FF0C}\x{3001}\x{964}\x{6D4}\x{60C})]+";

const PLAIN: Pre = Pre { names: &[], patterns: &[], whole_words: false, add_bos: false, compose: false };

const ALL: &[Pre] = &[
    Pre { names: &["default"], patterns: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"], ..PLAIN },
    Pre {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"],
        patterns: &[LLAMA3],
        whole_words: true,
        add_bos: true,
        ..PLAIN
    },
    Pre { names: &["dbrx", "smaug-bpe", "glm4", "chatglm-bpe"], patterns: &[LLAMA3], ..PLAIN },
    Pre {
        names: &["deepseek-llm"],
        patterns: &[
            r"[\r\n]",
            DEEPSEEK_LETTERS,
            r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}]+",
            r"\s+$",
            CJK,
            r"\p{N}+",
        ],
        ..PLAIN
    },
    Pre { names: &["deepseek-coder"], patterns: &[r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, r"\p{N}"], ..PLAIN },
    Pre {
        names: &["deepseek-v3", "hunyuan-dense"],
        patterns: &[r"\p{N}{1,3}", r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+", DEEPSEEK3],
        ..PLAIN
    },
    Pre { names: &["falcon"], patterns: &[r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"], ..PLAIN },
    Pre {
        names: &["starcoder", "refact", "smollm", "codeshell", "exaone", "minerva-7b"],
        patterns: &[r"\p{N}", GPT2],
        ..PLAIN
    },
    Pre { names: &["command-r"], patterns: &[r"\p{N}", GPT2], compose: true, ..PLAIN },
    Pre {
        names: &[
            "gpt-2",
            "phi-2",
            "jais",
            "trillion",
            "granite-docling",
            "exaone4",
            "gigachat",
            "a.x-4.0",
            "mellum",
            "jina-es",
            "jina-de",
            "jina-v2-es",
            "jina-v2-de",
            "jina-v1-en",
            "jina-v2-code",
            "roberta-bpe",
        ],
        patterns: &[GPT2],
        ..PLAIN
    },
    Pre { names: &["mpt", "olmo"], patterns: &[GPT2], compose: true, ..PLAIN },
    Pre { names: &["qwen2", "deepseek-r1-qwen", "megrez"], patterns: &[QWEN2], compose: true, ..PLAIN },
    Pre { names: &["stablelm2", "hunyuan", "grok-2", "solar-open", "kormo"], patterns: &[QWEN2], ..PLAIN },
    Pre { names: &["qwen35"], patterns: &[QWEN35], compose: true, ..PLAIN },
    Pre { names: &["poro-chat", "bloom", "gpt3-finnish"], patterns: &[PORO], ..PLAIN },
    Pre { names: &["viking"], patterns: &[PORO, r"\p{N}"], ..PLAIN },
    Pre { names: &["tekken"], patterns: &[TEKKEN], whole_words: true, add_bos: true, ..PLAIN },
    Pre { names: &["gpt-4o", "llama4", "kanana2", "minimax-m2"], patterns: &[GPT4O], ..PLAIN },
    Pre {
        names: &["bailingmoe", "bailingmoe2", "llada-moe"],
        patterns: &[
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
        ],
        ..PLAIN
    },
    Pre {
        names: &["seed-coder"],
        patterns: &[
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
        ..PLAIN
    },
];

/// What the name `name` stands for.
pub fn find(name: &str) -> Option<&'static Pre> {
    ALL.iter().find(|p| p.names.contains(&name))
}

/// The entries that cut words as `words` does: those with its patterns, or else those that cut a great many words alike.
pub fn recognise(words: &Words) -> Vec<&'static Pre> {
    let same: Vec<&Pre> = ALL.iter().filter(|p| p.patterns == words.patterns()).collect();
    if !same.is_empty() {
        return same;
    }
    let texts = probes();
    let alike = |pre: &&Pre| {
        Words::new(pre.patterns, false).is_ok_and(|other| texts.iter().all(|text| words.ends(text) == other.ends(text)))
    };
    ALL.iter().filter(alike).collect()
}

/// Texts in which all kinds of characters stand side by side, alone and in runs.
fn probes() -> Vec<String> {
    const KINDS: &[&str] = &[
        "abcdefghijklmnopqrstuvwxyz",
        "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
        "éßñüÉÑǅʰªſ",
        "'",
        "sStTmMdDrReEvVlL",
        "0123456789",
        "٣५８Ⅷ½²",
        "!\"#%&()*,-./:;?@[]_{}\\",
        "$+<=>^`|~",
        "…。，！？、“”‘’–—«»·",
        "€¥©™→∑°",
        " ",
        "\t",
        "\n",
        "\r",
        "\u{A0}\u{3000}\u{200B}\u{2028}\u{85}",
        "你好世界龥㐀",
        "あアーん",
        "가힣ᄀ",
        "ПриветЁ",
        "αΩςἀ",
        "مرحبا،",
        "नमस्ते।",
        "ไทย",
        "🚀👨😶",
        "\u{301}\u{308}\u{200D}\u{FE0F}",
        "\0\u{7F}\u{1}",
    ];
    // A congruential generator: the same texts each time.
    let mut state = 1u64;
    let mut next = move |n: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % n
    };
    let mut text = |kinds: usize| {
        let mut text = String::new();
        for _ in 0..kinds {
            let kind: Vec<char> = KINDS[next(KINDS.len())].chars().collect();
            let run = if next(2) == 0 { 1 } else { 1 + next(5) };
            text.extend((0..run).map(|_| kind[next(kind.len())]));
        }
        text
    };
    (0..3000).map(|i| text(1 + i % 12)).collect()
}

/// All names, for an error message.
pub fn names() -> String {
    ALL.iter().flat_map(|p| p.names).copied().collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pattern_compiles_and_names_are_unique() {
        let mut names: Vec<_> = ALL.iter().flat_map(|p| p.names).collect();
        let all = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), all);
        for pre in ALL {
            Words::new(pre.patterns, pre.compose).unwrap();
        }
        assert!(find("qwen2").is_some() && find("no-such").is_none());
    }
}
