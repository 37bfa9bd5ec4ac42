mod sets;
mod unpacked;

use super::*;
use proptest::prelude::*;
use rushlight_models::tokenizer::ChatTemplate;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};

/// Reference data that is not part of the repository; `None`, saying so, where it is absent.
fn shared(path: &str) -> Option<PathBuf> {
    let root = std::env::var_os("RUSHLIGHT_SHARED")
        .map_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared")), PathBuf::from);
    let path = root.join(path);
    if !path.exists() {
        println!("skipped: {} is absent", path.display());
        return None;
    }
    Some(path)
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/data").join(name)
}

/// A tokenizer of single bytes with chatml's marks, `<s>` before a text and `<|im_end|>` behind.
fn bytewise() -> Tokenizer {
    // GPT-2's alphabet: printable bytes spell themselves, the others follow from U+0100.
    let mut next = 256u32;
    let mut spell = |byte: u8| match byte {
        b'!'..=b'~' | 0xA1..=0xAC | 0xAE.. => char::from(byte),
        _ => {
            next += 1;
            char::from_u32(next - 1).unwrap()
        }
    };
    let vocab: serde_json::Map<String, Value> = (0..=255).map(|b| (spell(b).to_string(), json!(b))).collect();
    let mark = |id: u32, content: &str| json!({"id": id, "content": content, "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false});
    let level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    let file = json!({
        "version": "1.0", "normalizer": null, "pre_tokenizer": level, "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
        "added_tokens": [mark(256, "<|im_start|>"), mark(257, "<|im_end|>"), mark(258, "<s>")],
    });
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("tokenizer.json"), file.to_string()).unwrap();
    let config = json!({"bos_token": "<s>", "eos_token": "<|im_end|>", "add_bos_token": true});
    fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    Tokenizer::from_dir(dir.path()).unwrap()
}

fn settings() -> DataSettings {
    DataSettings {
        max_seq_len: 4096,
        too_long: TooLong::Cut,
        train_on_inputs: false,
        vocab_size: 259,
        columns: None,
        seed: 1,
    }
}

struct Room {
    dir: tempfile::TempDir,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    settings: DataSettings,
}

impl Room {
    fn new() -> Room {
        let template = ChatTemplate::builtin("chatml").unwrap();
        Room { dir: tempfile::tempdir().unwrap(), tokenizer: bytewise(), template, settings: settings() }
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::write(&path, content).unwrap();
        path
    }

    fn load_all(&self, sources: &[Source]) -> Result<Dataset> {
        load(sources, Some(&self.tokenizer), Some(&self.template), &self.settings, &mut |_, _| {})
    }

    fn load(&self, name: &str, content: impl AsRef<[u8]>) -> Result<Dataset> {
        self.load_all(&[Source::new(self.file(name, content))])
    }

    fn refusal(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        format!("{:#}", self.load(name, content).unwrap_err())
    }

    /// Each item as `show` prints it.
    fn shown(&self, data: &Dataset) -> Vec<String> {
        let item = |i| data.examples(i).iter().map(|e| show(e, Some(&self.tokenizer), false)).collect::<Vec<_>>();
        (0..data.len()).map(|i| item(i).join("|")).collect()
    }
}

const ONE: &str = "<s><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦yes<|im_end|>⟧\n";

#[test]
fn layouts_are_told_by_their_columns() {
    let room = Room::new();
    let messages = r#"{"messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"yes"}]}"#;
    let sharegpt = r#"{"conversations":[{"from":"human","value":"hi"},{"from":"gpt","value":"yes"}]}"#;
    let pretty = |s: &str| serde_json::to_string_pretty(&serde_json::from_str::<Value>(s).unwrap()).unwrap();
    let in_a_cell = |s: &str| s.replace('"', "\"\"");
    let list = r#"[{"role":"user","content":"hi"},{"role":"assistant","content":"yes"},{"role":"user","content":"?"}]"#;
    for (name, content) in [
        ("a.jsonl", messages.to_owned()),
        ("a.json", pretty(messages)),
        ("a.json", format!("[{messages}]")),
        ("a.json", pretty(&format!(r#"{{"version":1,"data":[{messages}],"tags":["x"]}}"#))),
        ("a.json", format!(r#"{{"version":1,"data":[{messages}]}}"#)),
        ("a.jsonl", format!(r#"{{"data":[{messages}]}}"#)),
        ("a.jsonl", format!(r#"{{"about":"{}","data":[{messages}]}}"#, "x".repeat(100_000))),
        ("a.json", format!(r#"{{"about":"{}","data":[{messages}]}}"#, "x".repeat(100_000))),
        ("a.jsonl", r#"{"prompt":"hi","completion":"yes","sources":[{"page":1}]}"#.into()),
        ("a.json", r#"{"prompt":"hi","completion":"yes","sources":[{"page":1}]}"#.into()),
        ("a.jsonl", format!("\u{feff}{sharegpt}\r\n\n")),
        ("no-extension", sharegpt.to_owned()),
        ("a.csv", format!("id,messages\n1,\"{}\"\n", in_a_cell(list))),
        ("a.jsonl", r#"{"instruction":"hi","input":"","output":"yes"}"#.into()),
        ("a.jsonl", r#"{"instruction":"hi","output":"yes","history":[]}"#.into()),
        ("a.jsonl", r#"{"prompt":"hi","completion":"yes"}"#.into()),
        ("a.jsonl", r#"{"query":"hi","response":"yes","id":7}"#.into()),
        (
            "a.jsonl",
            r#"{"prompt":[{"role":"user","content":"hi"}],"completion":[{"role":"assistant","content":"yes"}]}"#.into(),
        ),
        ("a.csv", "\u{feff}Question ; Source; Answer\nhi;book;yes\n".into()),
        ("a.csv", "Frage,Quelle,Antwort\nhi,Buch,yes\n".into()),
        ("a.csv", "sep=;\r\nquestion;a,b,c,d;answer\r\nhi;x;yes\r\n".into()),
        ("a.csv", "Vorne,Answer\n\"hi\",\"yes\"\n".into()),
        ("a.csv", "问题,答案\nhi,yes\n".into()),
        ("a.tsv", "sentence\tlabel\nhi\tyes\n".into()),
        ("a.csv", "text,label\nhi,yes\n".into()),
    ] {
        let data = room.load(name, &content).unwrap_or_else(|e| panic!("{content}: {e:#}"));
        assert_eq!(room.shown(&data), [ONE], "{content}");
    }
    let told = |line: &str| room.shown(&room.load("a.jsonl", line).unwrap()).remove(0);
    let user = |s: &str| format!("<|im_start|>user\n{s}<|im_end|>\n<|im_start|>assistant\n");
    let system = "<s><|im_start|>system\nS<|im_end|>\n";
    assert_eq!(
        told(r#"{"instruction":"a","input":"b","output":"c","history":[["q","r"]],"system":"S"}"#),
        format!("{system}{}⟦r<|im_end|>⟧\n{}⟦c<|im_end|>⟧\n", user("q"), user("a\nb"))
    );
    assert_eq!(told(r#"{"question":"a","context":"b","answer":7}"#), format!("<s>{}⟦7<|im_end|>⟧\n", user("a\nb")));
    // OpenAI's weights, parts and developer.
    assert_eq!(
        told(
            r#"{"messages":[{"role":"developer","content":"S"},{"role":"user","content":[{"type":"text","text":"a"}]},
                {"role":"assistant","content":"b","weight":0},{"role":"user","content":"c"},{"role":"assistant","content":"d","weight":1}]}"#
                .replace('\n', " ")
                .as_str()
        ),
        format!("{system}{}b<|im_end|>\n{}⟦d<|im_end|>⟧\n", user("a"), user("c"))
    );
    assert_eq!(told(r#"{"text":"ab"}"#), "<s>⟦ab<|im_end|>⟧");
    assert_eq!(told(r#"{"input_ids":[65,66,67],"labels":[-100,66,67],"attention_mask":[1,1,0]}"#), "A⟦B⟧");
    assert_eq!(told(r#"{"input_ids":[65,66,67]}"#), "A⟦BC⟧");
    assert_eq!(told(r#"{"input_ids":[65,66,67],"labels":[-100,67,-100]}"#), "A⟦B→C⟧C");
    // Whoever spells a mark makes none.
    assert_eq!(room.load("a.jsonl", r#"{"text":"<|im_end|>"}"#).unwrap().tokens(), 12);
}

#[test]
fn named_columns_and_inputs_are_learned_where_asked() {
    let mut room = Room::new();
    let table = "Front,Back,x\nhi,yes,1\n";
    let e = room.refusal("a.csv", table);
    assert!(e.contains("a.csv") && e.contains("front, back, x") && e.contains("--columns"), "{e}");
    room.settings.columns = Some(("Front".into(), "Back".into()));
    assert_eq!(room.shown(&room.load("a.csv", table).unwrap()), [ONE]);
    room.settings.train_on_inputs = true;
    let all = room.shown(&room.load("a.csv", table).unwrap()).remove(0);
    assert!(all.starts_with("<s>⟦<|im_start|>user") && all.ends_with("\n⟧"), "{all}");
    room.settings.columns = Some(("Front".into(), "nothing".into()));
    assert!(room.refusal("a.csv", table).contains("there is no column nothing"));
}

#[test]
fn what_cannot_be_used_is_listed_by_line() {
    let mut room = Room::new();
    room.settings.max_seq_len = 60;
    let good = r#"{"messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"yes"}]}"#;
    let long = r#"{"prompt":"hi","completion":"a long answer that does not fit into sixty tokens"}"#;
    let bad = [
        ("{broken", "broken JSON"),
        ("[1]", "not a JSON object"),
        ("{}", "the record is empty"),
        (r#"{"messages":[{"role":"user","content":"hi"}]}"#, "no assistant turn"),
        (r#"{"messages":[]}"#, "no assistant turn"),
        (r#"{"messages":"x"}"#, "column messages holds no list"),
        (r#"{"messages":[7]}"#, "message 1 is no object"),
        (r#"{"messages":[{"content":"x"}]}"#, "message 1 has no role"),
        (r#"{"messages":[{"role":"martian","content":"x"}]}"#, "its role \"martian\" is none of"),
        (
            r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":" "}]}"#,
            "message 2 (assistant) is empty",
        ),
        (
            r#"{"messages":[{"role":"user","content":[{"type":"image_url"}]}]}"#,
            "a part of type \"image_url\" is no text",
        ),
        (
            r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b","weight":0.5}]}"#,
            "neither 0 nor 1",
        ),
        (
            r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b","weight":0}]}"#,
            "each has weight 0",
        ),
        (
            r#"{"messages":[{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":"{}"}}]}]}"#,
            "calls tools, which",
        ),
        (r#"{"prompt":"","completion":"x"}"#, "the question is empty"),
        (r#"{"prompt":"x","completion":""}"#, "the answer is empty"),
        (r#"{"prompt":{"a":1},"completion":"x"}"#, "column prompt: an object"),
        (r#"{"question":"x","answer":["a","b"]}"#, "column answer: a list of 2 texts"),
        (r#"{"messages":null,"id":1}"#, "messages is null"),
        (r#"{"text":null}"#, "text is null"),
        (r#"{"prompt":"x","chosen":"a","rejected":"b"}"#, "preference training"),
        (r#"{"a":1,"b":2,"c":3}"#, "its columns (a, b, c) are none that are known"),
        (r#"{"text":" \n"}"#, "the text is empty"),
        (r#"{"input_ids":[1,259]}"#, "token 259 is outside the model's vocabulary of 259"),
        (r#"{"input_ids":[1,2],"labels":[-100,4096]}"#, "label 4096 is outside"),
        (r#"{"input_ids":[1,2],"labels":[-100,-1]}"#, "label -1 is outside"),
        (r#"{"input_ids":[1,2],"labels":[-100]}"#, "1 labels for 2 input_ids"),
        (r#"{"input_ids":[1,2],"labels":[1,-100]}"#, "nothing to learn"),
        (r#"{"input_ids":["x"]}"#, "input_ids holds \"x\""),
        (r#"{"input_ids":[]}"#, "input_ids is empty"),
        (
            r#"{"prompt":"a question that is so long that no answer fits","completion":"x"}"#,
            "no assistant turn within 60",
        ),
        ("{\"text\":\"\u{0}\"}", "broken JSON"),
    ];
    let mut file = format!("{good}\n{long}\n");
    bad.iter().for_each(|(line, _)| file += &format!("{line}\n"));
    let data = room.load("mixed.jsonl", &file).unwrap();
    assert_eq!(data.len(), 2);
    assert_eq!(data.origin(1), (room.dir.path().join("mixed.jsonl").as_path(), 2));
    let report = &data.report.files[0];
    assert_eq!((report.used(), report.cut.as_slice(), report.skipped.len()), (2, [(2, 73)].as_slice(), bad.len()));
    for (skipped, (k, (line, why))) in report.skipped.iter().zip(bad.iter().enumerate()) {
        assert_eq!(skipped.line, k as u64 + 3);
        assert!(skipped.why.contains(why) && !skipped.why.contains('\n'), "{line}: {}", skipped.why);
        // Alone, it is the file's error.
        let e = room.refusal("bad.jsonl", line);
        assert!(e.contains("bad.jsonl: nothing in it can be used: ") && e.contains(why), "{e}");
    }
    let told = data.report.to_string();
    assert!(
        told.contains("1 conversations, 1 questions and answers") && told.contains("1 cut to 60 tokens (line 2)"),
        "{told}"
    );
    assert!(told.contains("32 left out") && told.contains("lines 6, 7: no assistant turn"), "{told}");
    room.settings.too_long = TooLong::Skip;
    let data = room.load("mixed.jsonl", &file).unwrap();
    assert!(data.report.files[0].skipped.iter().any(|s| s.line == 2 && s.why.contains("--max-seq-len")));
    let e = room.refusal("a.csv", "prompt,completion\na,b,c\nd\n");
    assert!(e.contains("line 2: 3 fields, where the first row has 2") && e.contains("line 3"), "{e}");
}

#[test]
fn rows_of_tables_are_counted_as_editors_count_lines() {
    let room = Room::new();
    // Two lines in a cell, an empty line, and no line break behind the last row.
    let table = "prompt,completion\n\"a\nb\",c\n\n,x\nd,e\n,y";
    for table in [table.to_owned(), table.replace('\n', "\r\n")] {
        let data = room.load("a.csv", &table).unwrap();
        assert_eq!((data.origin(0).1, data.origin(1).1), (2, 6), "{table:?}");
        let skipped: Vec<u64> = data.report.files[0].skipped.iter().map(|s| s.line).collect();
        assert_eq!(skipped, [5, 7], "{table:?}");
        assert!(room.shown(&data)[0].contains("user\na\nb<"));
    }
    // A carriage return of its own stays.
    let data = room.load("a.tsv", "prompt\tcompletion\r\na\tb\r\nc\td\r\n").unwrap();
    assert_eq!((data.len(), data.origin(1).1), (2, 3));
    let data = room.load("a.csv", "prompt,completion\na,b\nc,\"d\ne,f\n").unwrap();
    assert_eq!(data.len(), 1);
    let told = data.report.to_string();
    assert!(told.contains("line 3: a quote that opens here is never closed: it takes all of 2 lines"), "{told}");
    let data = room.load("a.csv", "prompt,completion\na,b\nc,\"d\n\"\n").unwrap();
    assert_eq!(data.len(), 2);
    let e = room.refusal("a.csv", "prompt,completion\na,\"b\nc\",d\n");
    assert!(e.contains("line 2: 3 fields") && e.contains("a quote that opens here closes 1 lines further"), "{e}");
}

#[test]
fn columns_that_teach_nothing_are_named() {
    let room = Room::new();
    let of = |line: &str| room.load("a.jsonl", line).unwrap().report.to_string();
    let told = of(r#"{"document":"a text","Summary":"short","empty":"","none":null}"#);
    assert!(told.contains("nothing is learned from its column summary\n"), "{told}");
    let told = of(r#"{"question":"q","choices":["a","b"],"answer":1}"#);
    assert!(told.contains("column choices\n"), "{told}");
    let told = of(r#"{"question":"q","text":"t"}"#);
    assert!(told.contains("1 texts") && told.contains("column question\n"), "{told}");
    for line in [
        r#"{"instruction":"a","input":"b","output":"c","history":[["q","r"]],"system":"S"}"#,
        r#"{"messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"yes"}],"label":true,"tools":[]}"#,
        r#"{"input_ids":[65,66,67],"labels":[-100,66,67],"attention_mask":[1,1,0]}"#,
        r#"{"question":"a","context":"b","answer":7}"#,
    ] {
        assert!(!of(line).contains("nothing is learned"), "{line}");
    }
}

#[test]
fn files_of_no_use_are_errors() {
    let mut room = Room::new();
    for (name, content, why) in [
        ("a.jsonl", &b""[..], "the file is empty"),
        ("a.jsonl", b"\n\n", "neither { nor ["),
        ("a.jsonl", b"hello", "neither { nor ["),
        ("a.bin", b"hello", ".parquet and .txt"),
        ("a.json", b"[]", "it has no records"),
        ("a.json", b"[{\"text\":\"x\"},", "broken JSON: EOF"),
        ("a.json", b"[{\"text\":\"x\"}]]", "broken JSON"),
        ("a.csv", b"a,b\n", "it has no records"),
        ("a.csv", b"\xb9\xfe,b\n1,2\n", "save the table as UTF-8"),
        ("a.txt", b"ab\xff", "save the text as UTF-8"),
        ("a.txt", b" \n", "the text is empty"),
        ("a.jsonl.gz", b"\x1f\x8b\x08\0", "gzip: unpack it first"),
        ("a.csv", b"\xff\xfea\0", "UTF-16"),
        ("a.xls", b"\xd0\xcf\x11\xe0", "save it as .xlsx"),
        ("a.xlsx", b"PK\x03\x04garbage", "no readable .xlsx"),
        ("a.parquet", b"PAR1garbagePAR1", "no readable Parquet"),
    ] {
        let e = room.refusal(name, content);
        assert!(e.contains(name) && e.contains(why) && !e.contains('\n'), "{name}: {e}");
    }
    let e = format!("{:#}", room.load_all(&[Source::new("/no/such/file.jsonl")]).unwrap_err());
    assert!(e.contains("/no/such/file.jsonl") && e.contains("No such file"), "{e}");
    let e = format!("{:#}", room.load_all(&[Source::new(room.dir.path())]).unwrap_err());
    assert!(e.contains("directory"), "{e}");
    let chat = [Source::new(room.file("c.jsonl", r#"{"prompt":"a","completion":"b"}"#))];
    let text = [Source::new(room.file("t.jsonl", r#"{"text":"a"}"#))];
    let e = format!("{:#}", load(&chat, Some(&room.tokenizer), None, &room.settings, &mut |_, _| {}).unwrap_err());
    assert!(e.contains("c.jsonl") && e.contains("record 1") && e.contains("chat template"), "{e}");
    for sources in [&chat, &text] {
        let e = format!("{:#}", load(sources, None, None, &room.settings, &mut |_, _| {}).unwrap_err());
        assert!(e.contains("need a tokenizer"), "{e}");
    }
    assert_eq!(load(&text, Some(&room.tokenizer), None, &room.settings, &mut |_, _| {}).unwrap().len(), 1);
    room.settings.max_seq_len = 1;
    assert!(room.load_all(&text).unwrap_err().to_string().contains("--max-seq-len 1"));
}

#[test]
fn weights_and_validation_keep_records_apart() {
    let room = Room::new();
    let lines = |n: usize, mark: &str| {
        (0..n).map(|k| format!("{{\"prompt\":\"{mark}{k}\",\"completion\":\"x\"}}\n")).collect::<String>()
    };
    let (a, b) = (room.file("a.jsonl", lines(40, "a")), room.file("b.jsonl", lines(10, "b")));
    let sources = [Source { path: a, weight: 0.25 }, Source { path: b, weight: 2.5 }];
    let data = room.load_all(&sources).unwrap();
    assert_eq!(data.len(), 10 + 25);
    assert_eq!(room.shown(&data), room.shown(&room.load_all(&sources).unwrap()));
    let (train, held) = data.split(0.2, 3).unwrap();
    let (again, same) = data.split(0.2, 3).unwrap();
    assert_eq!((room.shown(&train), room.shown(&held)), (room.shown(&again), room.shown(&same)));
    assert_ne!(room.shown(&held), room.shown(&data.split(0.2, 4).unwrap().1));
    let mut held = room.shown(&held);
    // 10 + 10 records, each set aside once, with all their copies gone from what is left.
    assert_eq!(held.len(), 4);
    held.dedup();
    assert_eq!(held.len(), 4);
    assert!(room.shown(&train).iter().all(|t| !held.contains(t)));
    assert!(data.split(0.0, 1).is_err() && data.split(1.0, 1).is_err() && data.split(f64::NAN, 1).is_err());
    let one = room.load("one.jsonl", lines(1, "c")).unwrap();
    assert!(one.split(0.5, 1).unwrap_err().to_string().contains("only one record"));
}

#[test]
fn texts_fill_windows_and_lose_no_token() {
    let mut room = Room::new();
    room.settings.max_seq_len = 16;
    let texts = ["a".repeat(40), "bcd".into(), "ef".into(), "ghijklmnopqrst".into(), "u".repeat(15)];
    let file: String = texts.iter().map(|t| json!({"text": t}).to_string() + "\n").collect();
    let data = room.load("t.jsonl", file).unwrap();
    let (mut asked, mut ids) = (0, Vec::new());
    for item in 0..data.len() {
        assert!(data.item_tokens(item) <= 16);
        for e in data.examples(item) {
            // Every row but a text's last is asked for the next token, across the cuts as well.
            asked += e.counted();
            assert!(e.targets[..e.ids.len() - 1].iter().zip(&e.ids[1..]).all(|(t, id)| *t == Some(*id)));
            ids.extend(e.ids);
        }
    }
    // 42, 5, 4, 16 and 17 tokens; the last one of a text that would stand alone (17 = 16 + 1) has no row.
    assert_eq!((asked, ids.len()), (41 + 4 + 3 + 15 + 16, 42 + 5 + 4 + 16 + 16));
    assert_eq!(data.len(), 6, "{:?}", room.shown(&data));
    assert_eq!((data.examples(2).len(), data.examples(3).len()), (2, 1));
    // A plain file is one document, whatever its parts.
    let words = "word ".repeat(40_000) + "\n" + &"é".repeat(100_000);
    room.settings.max_seq_len = 1 << 20;
    let data = room.load("long.txt", &words).unwrap();
    let text: String = (0..data.len())
        .flat_map(|i| data.examples(i))
        .map(|e| room.tokenizer.decode_continued(&e.ids, false))
        .collect();
    assert!(data.report.files[0].used() > 4 && text == format!("<s>{words}<|im_end|>"));
}

#[test]
fn spreadsheets_and_parquet() {
    let room = Room::new();
    let data = room.load_all(&[Source::new(fixture("questions.xlsx"))]).unwrap();
    let shown = room.shown(&data);
    assert_eq!(shown.len(), 3);
    assert!(shown[0].contains("What is a rushlight?") && shown[0].contains("⟦A rush dipped in fat.<|im_end|>⟧"));
    assert!(shown[1].contains("⟦8<|im_end|>⟧") && shown[2].contains("⟦燃烧的光和热。<|im_end|>⟧"));
    let skipped = &data.report.files[0].skipped;
    assert_eq!((skipped.len(), skipped[0].line, &*skipped[0].why), (1, 5, "the answer is empty"));
    #[cfg(feature = "parquet")]
    {
        for name in ["messages-snappy.parquet", "messages-zstd.parquet"] {
            let shown = room.shown(&room.load_all(&[Source::new(fixture(name))]).unwrap());
            assert_eq!(shown.len(), 6);
            assert!(
                shown[3].contains("What is 3 plus 3? 多少") && shown[3].contains("⟦It is 6.<|im_end|>⟧"),
                "{}",
                shown[3]
            );
        }
        let ids =
            load(&[Source::new(fixture("ids-gzip.parquet"))], None, None, &room.settings, &mut |_, _| {}).unwrap();
        assert_eq!(ids.examples(0)[0].targets, [Some(2), Some(3), None]);
    }
}

#[test]
fn classes_are_told_from_answers() {
    let room = Room::new();
    let lines: String =
        (0..12).map(|k| format!("{{\"text\":\"t{k}\",\"label\":{}}}\n", usize::from(k % 3 == 0))).collect();
    let data = room.load("c.jsonl", &lines).unwrap();
    let found = classes::classes(&data).unwrap();
    let names: Vec<String> = found.iter().map(|c| room.tokenizer.decode_continued(c, true)).collect();
    assert_eq!(names, ["0", "1"]);
    let (prompt, answer) = data.question(0).unwrap();
    let example = classes::answered(prompt, answer);
    assert_eq!((example.ids.len() + 1, example.counted()), (data.tokens() / 12, 2));
    assert!(room.tokenizer.decode_continued(prompt, false).ends_with("assistant\n"));
    let free: String = (0..12).map(|k| format!("{{\"text\":\"t\",\"label\":\"l{k}\"}}\n")).collect();
    assert!(classes::classes(&room.load("f.jsonl", free).unwrap()).is_none());
    assert!(classes::classes(&room.load("t.jsonl", "{\"text\":\"abc\"}\n").unwrap()).is_none());
}

#[test]
fn tools_reach_templates_that_know_them() {
    let mut room = Room::new();
    let tools = r#"[{\"name\":\"f\"}]"#;
    let line = format!(
        r#"{{"conversations":[{{"from":"human","value":"q"}},{{"from":"function_call","value":"{{\"name\": \"f\", \"arguments\": {{\"x\": 1}}}}"}},{{"from":"observation","value":"o"}},{{"from":"gpt","value":"done"}}],"tools":"{tools}"}}"#
    );
    let data = room.load("t.jsonl", &line).unwrap();
    assert!(room.shown(&data)[0].contains("assistant\n⟦{\"name\": \"f\", \"arguments\": {\"x\": 1}}<|im_end|>⟧"));
    assert!(data.report.to_string().contains("1 with tools that the chat template does not show"));
    let source = "{% for t in tools %}{{ t.name }};{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\
        {% if m.tool_calls %}{% for c in m.tool_calls %}call {{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}\
        {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    room.template = ChatTemplate::from_source(source, "tools").unwrap();
    let data = room.load("t.jsonl", &line).unwrap();
    let shown = room.shown(&data).remove(0);
    assert!(shown.starts_with("<s>f;<|im_start|>user") && shown.contains("⟦call f {\"x\": 1}<|im_end|>⟧"), "{shown}");
    assert!(data.report.files[0].notes.is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn hostile_files_are_errors(at in 0usize..10_000, bytes in prop::collection::vec(any::<u8>(), 0..6), cut in any::<bool>(), which in 0usize..8) {
        let room = Room::new();
        let valid: Vec<(&str, Vec<u8>)> = vec![
            ("a.jsonl", br#"{"messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"yes","weight":1}],"tools":[{"name":"f"}]}"#.to_vec()),
            ("a.json", br#"{"data":[{"instruction":"a","input":"b","output":"c","history":[["d","e"]]},{"input_ids":[1,2],"labels":[-100,2]}]}"#.to_vec()),
            ("a.csv", b"question,answer\n\"a\nb\",c\n\"d\",\"e\"\n".to_vec()),
            ("a.tsv", b"sentence\tlabel\na\t1\nb\t0\n".to_vec()),
            ("a.txt", "é text\n".repeat(50).into_bytes()),
            ("a.xlsx", fs::read(fixture("questions.xlsx")).unwrap()),
            ("a.parquet", fs::read(fixture("messages-snappy.parquet")).unwrap()),
            ("b.parquet", fs::read(fixture("ids-gzip.parquet")).unwrap()),
        ];
        let (name, mut content) = valid[which].clone();
        let at = at % content.len();
        let end = if cut { content.len() } else { content.len().min(at + bytes.len()) };
        content.splice(at..end, bytes);
        match room.load(name, &content) {
            Ok(data) => prop_assert!((0..data.len()).all(|i| data.examples(i).iter().all(|e| e.ids.len() == e.targets.len()))),
            Err(e) => prop_assert!(e.to_string().contains(name), "{:#}", e),
        }
    }
}
