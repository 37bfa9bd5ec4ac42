//! `pull` against a hub of our own on the loopback interface, which breaks, lies and redirects as told.
#![cfg(feature = "hub")]

use rushlight::pull::{Event, Hub, Request, pull};
use rushlight::store::Store;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// A request as the server saw it.
#[derive(Clone, Debug)]
struct Seen {
    path: String,
    headers: HashMap<String, String>,
}

impl Seen {
    fn range(&self) -> Option<usize> {
        self.headers.get("range")?.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()
    }
}

type Handler = dyn Fn(&Seen, &mut TcpStream) -> std::io::Result<()> + Send + Sync;

/// A server that hands each request to `handler` and closes the connection.
struct Server {
    url: String,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Server {
    fn start(handler: impl Fn(&Seen, &mut TcpStream) -> std::io::Result<()> + Send + Sync + 'static) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (handler, log): (Arc<Handler>, _) = (Arc::new(handler), seen.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (handler, log) = (handler.clone(), log.clone());
                std::thread::spawn(move || serve(stream?, &*handler, &log));
            }
        });
        Server { url, seen }
    }

    fn hub(&self) -> Hub {
        Hub::new(&self.url, Some("hf_secret")).unwrap()
    }

    fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    /// The requests for a file's contents.
    fn fetched(&self) -> Vec<Seen> {
        self.seen().into_iter().filter(|s| s.path.contains("/resolve/")).collect()
    }
}

fn serve(mut stream: TcpStream, handler: &Handler, log: &Mutex<Vec<Seen>>) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().unwrap_or(Ok(String::new()))?;
    let mut headers = HashMap::new();
    for line in lines {
        let line = line?;
        match line.split_once(": ") {
            Some((name, value)) => headers.insert(name.to_lowercase(), value.to_string()),
            None => break,
        };
    }
    let seen = Seen { path: first.split(' ').nth(1).unwrap_or_default().to_string(), headers };
    log.lock().unwrap().push(seen.clone());
    handler(&seen, &mut stream)
}

fn answer(stream: &mut TcpStream, status: &str, headers: &[(&str, &str)], body: &[u8]) -> std::io::Result<()> {
    let mut head = format!("HTTP/1.1 {status}\r\nConnection: close\r\n");
    if !headers.iter().any(|h| h.0 == "Content-Length") {
        head += &format!("Content-Length: {}\r\n", body.len());
    }
    headers.iter().for_each(|(name, value)| head += &format!("{name}: {value}\r\n"));
    stream.write_all(format!("{head}\r\n").as_bytes())?;
    stream.write_all(body)
}

/// Three quarters of a megabyte that compress badly.
fn contents() -> Vec<u8> {
    (0..750_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

/// The listing of a repository with one large file.
fn listing(name: &str, bytes: &[u8]) -> String {
    let (size, oid) = (bytes.len(), sha256(bytes));
    format!(r#"[{{"type":"file","path":"{name}","oid":"aa","size":{size},"lfs":{{"oid":"{oid}","size":{size}}}}}]"#)
}

fn is_listing(seen: &Seen) -> bool {
    seen.path.starts_with("/api/models/")
}

/// The file, honouring a range.
fn whole(seen: &Seen, stream: &mut TcpStream, bytes: &[u8]) -> std::io::Result<()> {
    match seen.range() {
        None => answer(stream, "200 OK", &[("ETag", "\"v1\"")], bytes),
        Some(from) => {
            let range = format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len());
            answer(stream, "206 Partial Content", &[("Content-Range", &range), ("ETag", "\"v1\"")], &bytes[from..])
        }
    }
}

/// As much of the answer as `bytes`, with headers that promise more; then the connection ends.
fn broken(seen: &Seen, stream: &mut TcpStream, all: &[u8], give: usize) -> std::io::Result<()> {
    let from = seen.range().unwrap_or(0);
    let end = (from + give).min(all.len());
    let length = (all.len() - from).to_string();
    let range = format!("bytes {from}-{}/{}", all.len() - 1, all.len());
    let mut headers = vec![("Content-Length", length.as_str()), ("ETag", "\"v1\"")];
    let status = if from > 0 { "206 Partial Content" } else { "200 OK" };
    if from > 0 {
        headers.push(("Content-Range", &range));
    }
    answer(stream, status, &headers, &all[from..end])
}

fn request(text: &str) -> Request {
    Request { pause: Duration::from_millis(1), ..Request::parse(text).unwrap() }
}

struct Case {
    dir: tempfile::TempDir,
    store: Store,
    notes: Vec<String>,
}

impl Case {
    fn new() -> Case {
        let dir = tempfile::tempdir().unwrap();
        Case { store: Store::at(dir.path()), dir, notes: Vec::new() }
    }

    fn pull(&mut self, server: &Server, text: &str) -> anyhow::Result<rushlight::pull::Pulled> {
        self.run(server, &request(text))
    }

    fn run(&mut self, server: &Server, request: &Request) -> anyhow::Result<rushlight::pull::Pulled> {
        pull(&server.hub(), &self.store, request, &mut |event| {
            if let Event::Note(note) = event {
                self.notes.push(note.to_string());
            }
        })
    }

    fn error(&mut self, server: &Server, text: &str) -> String {
        let error = format!("{:#}", self.pull(server, text).unwrap_err());
        assert!(!error.contains('\n'), "{error}");
        assert!(self.store.list().unwrap().is_empty(), "nothing may have the final name");
        error
    }

    /// Files in the store by name.
    fn files(&self) -> Vec<String> {
        let read = std::fs::read_dir(self.dir.path().join("models"));
        let mut names: Vec<String> =
            read.into_iter().flatten().map(|f| f.unwrap().file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }
}

#[test]
fn a_broken_connection_is_resumed_and_the_second_pull_does_nothing() {
    let bytes = contents();
    let list = listing("m-Q4_K_M.gguf", &bytes);
    let all = bytes.clone();
    let server = Server::start(move |seen, stream| {
        if is_listing(seen) {
            answer(stream, "200 OK", &[], list.as_bytes())
        } else {
            broken(seen, stream, &all, 300_000)
        }
    });
    let mut case = Case::new();
    let pulled = case.pull(&server, "Owner/Some-Model-GGUF").unwrap();
    assert_eq!((pulled.name.as_str(), pulled.present), ("some-model", false));
    assert_eq!(std::fs::read(&pulled.path).unwrap(), bytes);
    let ranges: Vec<_> = server.fetched().iter().map(Seen::range).collect();
    assert_eq!(ranges, [None, Some(300_000), Some(600_000)]);
    assert_eq!(server.fetched()[1].headers["if-range"], "\"v1\"");
    assert_eq!(case.files(), [".some-model.json", "some-model.gguf"]);
    assert!(case.notes[0].contains("m-Q4_K_M.gguf"), "{:?}", case.notes);
    // Again: not a single request.
    let before = server.seen().len();
    assert!(case.pull(&server, "Owner/Some-Model-GGUF").unwrap().present);
    assert_eq!(server.seen().len(), before);
    // Asked for by its file: the listing alone.
    assert!(case.pull(&server, "Owner/Some-Model-GGUF:Q4_K_M").unwrap().present);
    assert_eq!(server.seen().len(), before + 1);
}

#[test]
fn another_run_goes_on_where_the_first_broke() {
    let bytes = contents();
    let (list, all, up) = (listing("m.gguf", &bytes), bytes.clone(), Arc::new(AtomicUsize::new(0)));
    let alive = up.clone();
    let server = Server::start(move |seen, stream| match is_listing(seen) {
        true => answer(stream, "200 OK", &[], list.as_bytes()),
        false if alive.load(Ordering::SeqCst) == 1 => whole(seen, stream, &all),
        false if seen.range().is_none() => broken(seen, stream, &all, 400_000),
        false => Ok(()),
    });
    let mut case = Case::new();
    let error = case.error(&server, "o/m");
    assert!(error.contains("goes on from here"), "{error}");
    up.store(1, Ordering::SeqCst);
    let before = server.fetched().len();
    let pulled = case.pull(&server, "o/m").unwrap();
    assert_eq!(std::fs::read(pulled.path).unwrap(), bytes);
    assert_eq!(server.fetched()[before..].iter().map(Seen::range).collect::<Vec<_>>(), [Some(400_000)]);
}

#[test]
fn a_wrong_hash_keeps_nothing() {
    let mut bytes = contents();
    let list = listing("m.gguf", &bytes);
    bytes[5] ^= 1;
    let server = Server::start(move |seen, stream| {
        if is_listing(seen) { answer(stream, "200 OK", &[], list.as_bytes()) } else { whole(seen, stream, &bytes) }
    });
    let mut case = Case::new();
    let error = case.error(&server, "o/m");
    assert!(error.contains("sha256") && error.contains("nothing was kept"), "{error}");
    assert!(case.files().is_empty(), "{:?}", case.files());
}

#[test]
fn a_damaged_rest_of_an_earlier_run_is_fetched_anew() {
    let bytes = contents();
    let (list, all) = (listing("m.gguf", &bytes), bytes.clone());
    let server = Server::start(move |seen, stream| {
        if is_listing(seen) { answer(stream, "200 OK", &[], list.as_bytes()) } else { whole(seen, stream, &all) }
    });
    let mut case = Case::new();
    let part = format!("models/.m.{}.part", &sha256(&bytes)[..16]);
    std::fs::create_dir(case.dir.path().join("models")).unwrap();
    std::fs::write(case.dir.path().join(part), vec![0; 1000]).unwrap();
    assert_eq!(std::fs::read(case.pull(&server, "o/m").unwrap().path).unwrap(), bytes);
    assert_eq!(server.fetched().iter().map(Seen::range).collect::<Vec<_>>(), [Some(1000), None]);
}

#[test]
fn a_server_that_ignores_ranges_still_delivers() {
    let bytes = contents();
    let (list, all, tries) = (listing("m.gguf", &bytes), bytes.clone(), AtomicUsize::new(0));
    let server = Server::start(move |seen, stream| {
        if is_listing(seen) {
            return answer(stream, "200 OK", &[], list.as_bytes());
        }
        let unranged = Seen { headers: HashMap::new(), ..seen.clone() };
        match tries.fetch_add(1, Ordering::SeqCst) {
            0 | 1 => broken(&unranged, stream, &all, 500_000),
            _ => whole(&unranged, stream, &all),
        }
    });
    let mut case = Case::new();
    assert_eq!(std::fs::read(case.pull(&server, "o/m").unwrap().path).unwrap(), bytes);
    assert_eq!(server.fetched().len(), 3);
}

#[test]
fn a_server_that_always_breaks_is_given_up() {
    let bytes = contents();
    let list = listing("m.gguf", &bytes);
    let server = Server::start(move |seen, stream| {
        let unranged = Seen { headers: HashMap::new(), ..seen.clone() };
        if is_listing(seen) {
            answer(stream, "200 OK", &[], list.as_bytes())
        } else {
            broken(&unranged, stream, &bytes, 500_000)
        }
    });
    let error = Case::new().error(&server, "o/m");
    assert!(error.contains("broke") || error.contains("early"), "{error}");
    assert!(server.fetched().len() < 12);
}

#[test]
fn the_token_stays_with_the_hub() {
    let bytes = contents();
    let (list, all, oid) = (listing("m.gguf", &bytes), bytes.clone(), sha256(&bytes));
    let other = Server::start(move |seen, stream| whole(seen, stream, &all));
    // The same machine under another name, and so another host.
    let elsewhere = other.url.replace("127.0.0.1", "localhost");
    let server = Server::start(move |seen, stream| {
        if is_listing(seen) {
            return answer(stream, "200 OK", &[], list.as_bytes());
        }
        let etag = format!("\"{oid}\"");
        match seen.path.as_str() {
            "/o/m/resolve/main/m.gguf" => {
                answer(stream, "307 Temporary Redirect", &[("Location", "/moved/resolve/x")], b"")
            }
            _ => {
                let to = format!("{elsewhere}/blob?signature=1");
                answer(stream, "302 Found", &[("Location", &to), ("X-Linked-Etag", &etag)], b"go there")
            }
        }
    });
    let mut case = Case::new();
    assert_eq!(std::fs::read(case.pull(&server, "o/m").unwrap().path).unwrap(), bytes);
    let token = |seen: &[Seen]| seen.iter().map(|s| s.headers.contains_key("authorization")).collect::<Vec<_>>();
    assert_eq!(token(&server.seen()), [true, true, true]);
    assert_eq!(token(&other.seen()), [false]);
    assert_eq!(other.seen()[0].path, "/blob?signature=1");
}

#[test]
fn redirects_in_circles_end() {
    let bytes = contents();
    let list = listing("m.gguf", &bytes);
    let server = Server::start(move |seen, stream| {
        if is_listing(seen) {
            return answer(stream, "200 OK", &[], list.as_bytes());
        }
        answer(stream, "302 Found", &[("Location", &seen.path)], b"")
    });
    assert!(Case::new().error(&server, "o/m").contains("circles"));
    let server = Server::start(|_, stream| answer(stream, "302 Found", &[("Location", "file:///etc/passwd")], b""));
    assert!(Case::new().error(&server, "o/m").contains("neither http nor https"));
}

#[test]
fn refusals_say_what_to_do() {
    for (status, says) in
        [("404 Not Found", "check the name"), ("401 Unauthorized", "HF_TOKEN"), ("403 Forbidden", "terms")]
    {
        let server = Server::start(move |_, stream| answer(stream, status, &[], b"<html>no</html>"));
        let error = Case::new().error(&server, "o/m");
        assert!(error.contains(says) && error.contains("o/m"), "{status}: {error}");
        assert_eq!(server.seen().len(), 1, "{status} is final");
    }
    let server = Server::start(|_, stream| answer(stream, "200 OK", &[], b"<html>hello</html>"));
    assert!(Case::new().error(&server, "o/m").contains("no file list"));
}

#[test]
fn an_overloaded_server_is_asked_again() {
    let bytes = contents();
    let (list, all, tries) = (listing("m.gguf", &bytes), bytes.clone(), AtomicUsize::new(0));
    let server = Server::start(move |seen, stream| match tries.fetch_add(1, Ordering::SeqCst) {
        0 => answer(stream, "429 Too Many Requests", &[("Retry-After", "0")], b""),
        1 => answer(stream, "500 Internal Server Error", &[], b""),
        2 => answer(stream, "200 OK", &[], list.as_bytes()),
        3 => answer(stream, "503 Service Unavailable", &[], b""),
        _ => whole(seen, stream, &all),
    });
    let mut case = Case::new();
    assert_eq!(std::fs::read(case.pull(&server, "o/m").unwrap().path).unwrap(), bytes);
    assert!(case.notes.iter().any(|n| n.contains("429") && n.contains("trying again")), "{:?}", case.notes);
    let server = Server::start(|_, stream| answer(stream, "500 Internal Server Error", &[], b""));
    assert!(Case::new().error(&server, "o/m").contains("500"));
    assert!(server.seen().len() > 1);
}

#[test]
fn a_lie_about_the_length_is_noticed() {
    let bytes = contents();
    let list = listing("m.gguf", &bytes);
    let (short, long, chunked) = (bytes[..500_000].to_vec(), [&bytes[..], b"more"].concat(), bytes.clone());
    let l = list.clone();
    let server = Server::start(move |seen, stream| {
        let body = if is_listing(seen) { l.as_bytes() } else { &short };
        answer(stream, "200 OK", &[], body)
    });
    assert!(Case::new().error(&server, "o/m").contains("the server sends 500000 bytes, the hub's listing says 750000"));
    let l = list.clone();
    let server = Server::start(move |seen, stream| {
        if is_listing(seen) {
            return answer(stream, "200 OK", &[], l.as_bytes());
        }
        // No length at all, and more than was listed.
        stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n")?;
        for chunk in long.chunks(100_000) {
            stream.write_all(format!("{:x}\r\n", chunk.len()).as_bytes())?;
            stream.write_all(&[chunk, b"\r\n"].concat())?;
        }
        stream.write_all(b"0\r\n\r\n")
    });
    assert!(Case::new().error(&server, "o/m").contains("sends more than the 750000 bytes"));
    let server = Server::start(move |seen, stream| {
        if is_listing(seen) {
            return answer(stream, "200 OK", &[], list.as_bytes());
        }
        stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")?;
        stream.write_all(&chunked)
    });
    let mut case = Case::new();
    assert_eq!(std::fs::read(case.pull(&server, "o/m").unwrap().path).unwrap(), bytes);
}

#[test]
fn hostile_names_are_refused() {
    for name in ["../../evil.gguf", "a/../../evil.gguf", "/etc/evil.gguf", "..\\\\evil.gguf"] {
        let list = listing(name, b"evil");
        let server = Server::start(move |_, stream| answer(stream, "200 OK", &[], list.as_bytes()));
        assert!(Case::new().error(&server, "o/m").contains("not a safe name"), "{name}");
    }
    for bad in ["noslash", "a/b/c", "../b", "a/..", "a/b c", "/b", "a/", "", "a/.b"] {
        assert!(Request::parse(bad).is_err(), "{bad}");
    }
    let parsed = Request::parse("https://huggingface.co/o/m:Q8_0").unwrap();
    assert_eq!((parsed.repo.as_str(), parsed.file.as_deref()), ("o/m", Some("Q8_0")));
    let server = Server::start(|_, _| Ok(()));
    let named = Request { name: Some("../x".into()), ..request("o/m") };
    assert!(Case::new().run(&server, &named).unwrap_err().to_string().contains("cannot be a model's name"));
}

#[test]
fn a_directory_appears_when_it_is_whole() {
    let bytes = contents();
    let (size, oid) = (bytes.len(), sha256(&bytes));
    let list = format!(
        r#"[{{"type":"file","path":"config.json","oid":"c0","size":2}},
            {{"type":"file","path":"tokenizer.json","oid":"c1","size":4}},
            {{"type":"file","path":"README.md","oid":"c2","size":4}},
            {{"type":"file","path":"model.safetensors","oid":"c3","size":{size},"lfs":{{"oid":"{oid}","size":{size}}}}}]"#
    );
    let broken_once = AtomicUsize::new(0);
    let all = bytes.clone();
    let server = Server::start(move |seen, stream| match seen.path.rsplit('/').next().unwrap() {
        "config.json" => answer(stream, "200 OK", &[], b"{}"),
        "tokenizer.json" => answer(stream, "200 OK", &[], b"{  }"),
        "model.safetensors" if broken_once.fetch_add(1, Ordering::SeqCst) < 1 => {
            answer(stream, "404 Not Found", &[], b"")
        }
        "model.safetensors" => whole(seen, stream, &all),
        _ => answer(stream, "200 OK", &[], list.as_bytes()),
    });
    let mut case = Case::new();
    case.error(&server, "o/Dir-Model");
    let pulled = case.pull(&server, "o/Dir-Model").unwrap();
    assert_eq!((pulled.name.as_str(), pulled.bytes), ("dir-model", size as u64 + 6));
    assert_eq!(std::fs::read(pulled.path.join("model.safetensors")).unwrap(), bytes);
    assert_eq!(case.files(), [".dir-model.json", "dir-model"]);
    // The small files of the failed run were kept, README never wanted.
    let fetched = server.fetched();
    assert_eq!(fetched.iter().filter(|s| s.path.ends_with("config.json")).count(), 1);
    assert!(!fetched.iter().any(|s| s.path.ends_with("README.md")));
    assert!(case.pull(&server, "o/Dir-Model").unwrap().present);
}

#[test]
fn names_are_not_taken_from_other_models() {
    let bytes = contents();
    let (list, all) = (listing("m.gguf", &bytes), bytes.clone());
    let server = Server::start(move |seen, stream| {
        if is_listing(seen) { answer(stream, "200 OK", &[], list.as_bytes()) } else { whole(seen, stream, &all) }
    });
    let mut case = Case::new();
    case.pull(&server, "first/m").unwrap();
    let error = case.pull(&server, "second/m").unwrap_err().to_string();
    assert!(error.contains("--name") && error.contains("--force"), "{error}");
    let named = Request { name: Some("m2".into()), ..request("second/m") };
    assert_eq!(case.run(&server, &named).unwrap().name, "m2");
    let forced = Request { force: true, ..request("second/m") };
    assert!(!case.run(&server, &forced).unwrap().present);
    assert_eq!(case.files(), [".m.json", ".m2.json", "m.gguf", "m2.gguf"]);
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_one_clear_line() {
    let bytes = contents();
    let (list, all) = (listing("m.gguf", &bytes), bytes.clone());
    let server = Server::start(move |seen, stream| {
        if is_listing(seen) { answer(stream, "200 OK", &[], list.as_bytes()) } else { whole(seen, stream, &all) }
    });
    let mut case = Case::new();
    let models = case.dir.path().join("models");
    std::fs::create_dir(&models).unwrap();
    // The device on which every write finds the disk full.
    let part = models.join(format!(".m.{}.part", &sha256(&bytes)[..16]));
    std::os::unix::fs::symlink("/dev/full", part).unwrap();
    let error = case.error(&server, "o/m");
    assert!(error.contains("make room"), "{error}");
}

#[test]
fn the_command_itself() {
    let bytes = contents();
    let (list, all) = (listing("m-Q8_0.gguf", &bytes), bytes.clone());
    let server = Server::start(move |seen, stream| {
        if is_listing(seen) { answer(stream, "200 OK", &[], list.as_bytes()) } else { whole(seen, stream, &all) }
    });
    let (home, hf) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    std::fs::write(hf.path().join("token"), "hf_from_file\n").unwrap();
    let run = |args: &[&str]| {
        let out = std::process::Command::new(env!("CARGO_BIN_EXE_rushlight"))
            .args(args)
            .env("RUSHLIGHT_HOME", home.path())
            .env("HF_ENDPOINT", &server.url)
            .env("HF_HOME", hf.path())
            .env_remove("HF_TOKEN")
            .env_remove("HF_TOKEN_PATH")
            .output()
            .unwrap();
        let text = |b: Vec<u8>| String::from_utf8(b).unwrap();
        (out.status.code(), text(out.stdout), text(out.stderr))
    };
    let (code, out, err) = run(&["pull", "o/m", "--json"]);
    assert_eq!(code, Some(0), "{err}");
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((json["name"].as_str(), json["bytes"].as_u64()), (Some("m"), Some(750_000)));
    assert_eq!(server.seen()[0].headers["authorization"], "Bearer hf_from_file");
    assert_eq!(std::fs::read(home.path().join("models/m.gguf")).unwrap(), bytes);
    let (code, out, _) = run(&["list"]);
    assert!(code == Some(0) && out.contains("m "), "{out}");
    let (code, out, err) = run(&["pull", "not-a-repo"]);
    assert_eq!((code, out.as_str(), err.lines().count()), (Some(2), "", 1), "{err}");
    let (code, out, err) = run(&["pull", "o/m:Q2_K"]);
    assert_eq!((code, out.as_str()), (Some(1), ""));
    assert!(err.starts_with("error: ") && err.lines().count() == 1 && err.contains("m-Q8_0.gguf"), "{err}");
}
