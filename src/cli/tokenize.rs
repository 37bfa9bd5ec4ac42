use anyhow::{Context, Result, bail};
use rushlight_models::tokenizer::{ChatTemplate, RenderOptions, Specials, Tokenizer};
use serde_json::{Map, Value, json};
use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

/// Show the tokens of a text, or a conversation as a chat template lays it out.
#[derive(clap::Args, Clone, Debug)]
pub struct TokenizeArgs {
    /// A `.gguf` file or a directory; one that holds only a tokenizer will do
    pub model: Option<String>,
    /// The text
    pub text: Option<String>,
    /// Read the text from this file (`-`: standard input)
    #[arg(short, long, conflicts_with = "text", value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Render this conversation instead: JSON with `messages`, and any of `add_generation_prompt`, `tools`, ...
    #[arg(long, conflicts_with_all = ["text", "file"], value_name = "FILE")]
    pub chat: Option<PathBuf>,
    /// Chat template to use: a file, or the name of a built-in one
    #[arg(long, requires = "chat", value_name = "FILE|NAME")]
    pub template: Option<String>,
    /// Leave out the beginning-of-text token
    #[arg(long)]
    pub no_bos: bool,
    /// Take every special token spelled in the text for the token (by default: those that the vocabulary's own
    /// library takes)
    #[arg(long)]
    pub parse_special: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Runs `rushlight tokenize`.
pub fn run(args: &TokenizeArgs) -> Result<()> {
    if let Some(chat) = &args.chat {
        return render(args, chat);
    }
    let model = args.model.as_deref().context("name a MODEL: a .gguf file or a directory with a tokenizer")?;
    let text = match (&args.file, &args.text) {
        (Some(path), _) => read_text(path)?,
        (None, Some(text)) => text.clone(),
        (None, None) => bail!("give a text, or a file with -f"),
    };
    let tokenizer = Tokenizer::open(Path::new(model))?;
    let specials = if args.parse_special { Specials::Parse } else { Specials::Native };
    let mut ids = tokenizer.encode(&text, specials)?;
    if !args.no_bos {
        ids.splice(0..0, tokenizer.prefix());
    }
    let pieces: Vec<_> = ids.iter().map(|&id| tokenizer.piece(id).unwrap_or_default()).collect();
    let mut out = String::new();
    if args.json {
        out = json!({ "ids": ids, "pieces": pieces }).to_string() + "\n";
    } else {
        for (id, piece) in ids.iter().zip(&pieces) {
            out.push_str(&format!("{id:>7}  {piece:?}\n"));
        }
    }
    print(&out)
}

fn render(args: &TokenizeArgs, chat: &Path) -> Result<()> {
    let bytes = fs::read(chat).with_context(|| chat.display().to_string())?;
    let chat: Value = serde_json::from_slice(&bytes).with_context(|| format!("{}: not JSON", chat.display()))?;
    let (messages, options) = conversation(chat)?;
    let tokenizer = args.model.as_deref().map(|m| Tokenizer::open(Path::new(m))).transpose()?;
    let template = match (&args.template, &args.model) {
        (Some(name), _) => match ChatTemplate::builtin(name) {
            Some(template) => template,
            None => {
                let names = ChatTemplate::builtin_names().collect::<Vec<_>>().join(", ");
                let source = fs::read_to_string(name)
                    .with_context(|| format!("{name}: neither a file nor a built-in template ({names})"))?;
                ChatTemplate::from_source(&source, name)?
            }
        },
        (None, Some(model)) => {
            let own = ChatTemplate::open(Path::new(model))?;
            match &tokenizer {
                Some(tokenizer) => ChatTemplate::choose(own, tokenizer)?,
                None => bail!("name a MODEL or a --template"),
            }
        }
        (None, None) => bail!("name a MODEL or a --template"),
    };
    let (text, ids) = match &tokenizer {
        Some(tokenizer) => {
            let options = template.with_marks(tokenizer, &options);
            (template.render(&messages, &options)?, Some(template.encode_chat(tokenizer, &messages, &options)?))
        }
        None => (template.render(&messages, &options)?, None),
    };
    if !args.json {
        return print(&text);
    }
    let mut result = Map::from_iter([("text".to_string(), Value::from(text))]);
    if let Some(ids) = ids {
        result.insert("ids".into(), ids.into());
    }
    print(&(Value::from(result).to_string() + "\n"))
}

/// The messages of a conversation file, and everything else in it as options.
fn conversation(chat: Value) -> Result<(Vec<Value>, RenderOptions)> {
    let Value::Object(mut extra) = chat else { bail!("the conversation must be a JSON object with \"messages\"") };
    let Some(Value::Array(messages)) = extra.shift_remove("messages") else {
        bail!("the conversation has no list \"messages\"");
    };
    let mut token = |key: &str| extra.shift_remove(key).and_then(|v| v.as_str().map(str::to_string));
    let (bos_token, eos_token) = (token("bos_token"), token("eos_token"));
    let add_generation_prompt = extra.shift_remove("add_generation_prompt").is_some_and(|v| v == true);
    let tools = extra.shift_remove("tools").filter(|t| !t.is_null());
    Ok((messages, RenderOptions { add_generation_prompt, tools, bos_token, eos_token, extra }))
}

fn read_text(path: &Path) -> Result<String> {
    let mut bytes = Vec::new();
    let shown = path.display();
    if path == Path::new("-") {
        io::stdin().read_to_end(&mut bytes).context("standard input")?;
    } else {
        bytes = fs::read(path).with_context(|| shown.to_string())?;
    }
    String::from_utf8(bytes).map_err(|e| {
        anyhow::anyhow!("{shown}: not UTF-8 text (byte {} is wrong); convert it first", e.utf8_error().valid_up_to())
    })
}

fn print(text: &str) -> Result<()> {
    io::stdout().write_all(text.as_bytes()).context("standard output")
}
