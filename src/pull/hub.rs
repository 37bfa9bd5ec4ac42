//! The hub's HTTP interface: what a repository holds, and its files. The token goes to the hub and nowhere else.

use anyhow::{Context, Result, anyhow, bail, ensure};
use std::path::PathBuf;
use std::time::Duration;
use ureq::http::{Response, StatusCode, header};
use ureq::{Agent, Body};

/// A connection to a model hub.
pub struct Hub {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
}

/// A file of a repository, as the hub lists it.
#[derive(Clone, Debug, PartialEq)]
pub struct Listed {
    /// Path in the repository, with `/`.
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// SHA-256 of the contents (64 hexadecimal digits); files that the hub keeps in plain git have none.
    pub sha256: Option<String>,
    /// The hub's identity of the contents: the sha256 or git's own hash.
    pub identity: String,
}

/// Why a request brought nothing.
#[derive(Debug)]
pub enum Failure {
    /// Trying again may help: the connection broke, or the server is overloaded (and may say for how long).
    Passing(String, Option<Duration>),
    /// Trying again does not help.
    Final(anyhow::Error),
}

/// The answer to a request, after redirects.
pub struct Answer {
    /// Status, headers and body.
    pub response: Response<Body>,
    /// `X-Linked-Etag` of the hub itself: the sha256 of a large file.
    pub linked_sha256: Option<String>,
}

impl Hub {
    /// The hub of `HF_ENDPOINT` (default `https://huggingface.co`), with the token of `HF_TOKEN`, or of the file
    /// `HF_TOKEN_PATH` or `$HF_HOME/token` where `huggingface-cli login` leaves it.
    pub fn from_env() -> Result<Hub> {
        let endpoint = var("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        let file = var("HF_TOKEN_PATH").map(PathBuf::from).or_else(|| Some(hf_home()?.join("token")));
        let token = var("HF_TOKEN").or_else(|| std::fs::read_to_string(file?).ok());
        Hub::new(&endpoint, token.as_deref())
    }

    /// The hub at `endpoint`.
    pub fn new(endpoint: &str, token: Option<&str>) -> Result<Hub> {
        let endpoint = endpoint.trim().trim_end_matches('/');
        origin(endpoint).with_context(|| format!("HF_ENDPOINT is '{endpoint}'"))?;
        let token = token.map(str::trim).filter(|t| !t.is_empty()).map(String::from);
        if let Some(token) = &token {
            ensure!(token.bytes().all(|b| b.is_ascii_graphic()), "HF_TOKEN has characters that no token has");
        }
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            // Redirects are followed here, where the token can be kept from other hosts.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_connect(Some(Duration::from_secs(30)))
            .timeout_recv_response(Some(Duration::from_secs(60)))
            .timeout_per_read(Some(Duration::from_secs(60)))
            .user_agent(concat!("rushlight/", env!("CARGO_PKG_VERSION")))
            .build()
            .new_agent();
        Ok(Hub { agent, endpoint: endpoint.into(), token })
    }

    /// Where the hub is.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// The files of `repo` at `revision`.
    pub fn list(&self, repo: &str, revision: &str) -> Result<Vec<Listed>, Failure> {
        let mut url = format!("{}/api/models/{repo}/tree/{}?recursive=true", self.endpoint, escape(revision));
        let mut files = Vec::new();
        // The hub gives a thousand files a page.
        for _ in 0..100 {
            let answer = self.get(&url, &[])?;
            let status = answer.response.status();
            if status != StatusCode::OK {
                return Err(self.refused(&answer.response, repo, None));
            }
            let next = answer.response.headers().get(header::LINK).and_then(|l| next_page(l.to_str().ok()?));
            let text = answer
                .response
                .into_body()
                .with_config()
                .limit(64 << 20)
                .read_to_vec()
                .map_err(|e| passing(&self.endpoint, &e))?;
            files.extend(listing(&text).map_err(|e| {
                Failure::Final(e.context(format!("{} answered with something that is no file list", self.endpoint)))
            })?);
            match next {
                Some(next) => url = join(&url, &next).map_err(Failure::Final)?,
                None => break,
            }
        }
        Ok(files)
    }

    /// The address of a file.
    pub fn file_url(&self, repo: &str, revision: &str, path: &str) -> String {
        let path = path.split('/').map(escape).collect::<Vec<_>>().join("/");
        format!("{}/{repo}/resolve/{}/{path}", self.endpoint, escape(revision))
    }

    /// Asks for `url`, following redirects; the token goes along to the hub's own origin alone.
    pub fn get(&self, url: &str, headers: &[(&str, &str)]) -> Result<Answer, Failure> {
        let own = origin(&self.endpoint).map_err(Failure::Final)?;
        let mut url = url.to_string();
        let mut linked_sha256 = None;
        for _ in 0..10 {
            let here = origin(&url).map_err(Failure::Final)?;
            if own.starts_with("https:") && !here.starts_with("https:") {
                return Err(Failure::Final(anyhow!(
                    "the hub sends us to {here}, which is not encrypted: not followed"
                )));
            }
            let mut request = self.agent.get(&url).header("Accept-Encoding", "identity");
            for (name, value) in headers {
                request = request.header(*name, *value);
            }
            if let Some(token) = self.token.as_ref().filter(|_| here == own) {
                request = request.header("Authorization", format!("Bearer {token}"));
            }
            let response = request.call().map_err(|e| passing(&here, &e))?;
            if here == own {
                let etag = response.headers().get("x-linked-etag").and_then(|e| e.to_str().ok());
                linked_sha256 = linked_sha256.or(etag.and_then(as_sha256));
            }
            let to = response.headers().get(header::LOCATION).and_then(|l| l.to_str().ok());
            match to {
                Some(to) if response.status().is_redirection() => url = join(&url, to).map_err(Failure::Final)?,
                _ => return Ok(Answer { response, linked_sha256 }),
            }
        }
        Err(Failure::Final(anyhow!("{} redirects in circles", self.endpoint)))
    }

    /// What a status other than success means for a request about `repo` (and `file`).
    pub fn refused(&self, response: &Response<Body>, repo: &str, file: Option<&str>) -> Failure {
        let status = response.status();
        let what = file.map_or(repo.to_string(), |file| format!("{repo}/{file}"));
        let on = &self.endpoint;
        match status.as_u16() {
            429 | 500..=599 => {
                let seconds = response.headers().get(header::RETRY_AFTER).and_then(|s| s.to_str().ok()?.parse().ok());
                let wait = seconds.map(|s: u64| Duration::from_secs(s.min(60)));
                Failure::Passing(format!("{on} answers {status} for {what}"), wait)
            }
            401 if self.token.is_none() => Failure::Final(anyhow!(
                "{what}: {on} has no such public model: check the name; for a private or gated one set HF_TOKEN"
            )),
            401 => {
                Failure::Final(anyhow!("{what}: {on} has no such model for this token: check the name and HF_TOKEN"))
            }
            403 => Failure::Final(anyhow!(
                "{what}: {on} refuses access: accept the model's terms at {on}/{repo} and set HF_TOKEN"
            )),
            404 => Failure::Final(anyhow!("{what}: not found on {on}: check the name")),
            _ => Failure::Final(anyhow!("{what}: {on} answers {status}")),
        }
    }
}

/// The directory of Hugging Face's own tools: `HF_HOME`, or `~/.cache/huggingface`.
pub fn hf_home() -> Option<PathBuf> {
    if let Some(home) = var("HF_HOME") {
        return Some(home.into());
    }
    let cache = var("XDG_CACHE_HOME").map(PathBuf::from);
    let home = || var(if cfg!(windows) { "USERPROFILE" } else { "HOME" });
    Some(cache.or_else(|| Some(PathBuf::from(home()?).join(".cache")))?.join("huggingface"))
}

fn var(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|v| !v.trim().is_empty())
}

fn passing(host: &str, error: &ureq::Error) -> Failure {
    match error {
        ureq::Error::HostNotFound => Failure::Final(anyhow!("{host}: no such host: check the network and HF_ENDPOINT")),
        ureq::Error::Http(_) | ureq::Error::BadUri(_) | ureq::Error::InvalidProxyUrl => {
            Failure::Final(anyhow!("{host}: {error}"))
        }
        _ => Failure::Passing(format!("{host}: {error}"), None),
    }
}

/// Scheme, host and port of a URL.
fn origin(url: &str) -> Result<String> {
    let (scheme, rest) = url.split_once("://").with_context(|| format!("'{url}' is not a URL"))?;
    let host = rest.split(['/', '?', '#']).next().unwrap_or_default();
    ensure!(matches!(scheme, "http" | "https"), "'{url}' is neither http nor https");
    ensure!(!host.is_empty() && !host.contains(['@', '\\']), "'{url}' has no plain host name");
    let port = if scheme == "https" { ":443" } else { ":80" };
    Ok(format!("{scheme}://{}", host.strip_suffix(port).unwrap_or(host).to_ascii_lowercase()))
}

/// `location` as seen from `base`.
fn join(base: &str, location: &str) -> Result<String> {
    if location.contains("://") {
        origin(location)?;
        return Ok(location.into());
    }
    let own = origin(base)?;
    if let Some(rest) = location.strip_prefix("//") {
        let scheme = own.split_once("://").map_or("https", |(scheme, _)| scheme);
        return Ok(format!("{scheme}://{rest}"));
    }
    if location.starts_with('/') {
        return Ok(format!("{own}{location}"));
    }
    let path = base.split(['?', '#']).next().unwrap_or(base);
    let folder = path.rsplit_once('/').map_or(path, |(folder, _)| folder);
    Ok(format!("{folder}/{location}"))
}

/// The address of the next page in a Link header.
fn next_page(link: &str) -> Option<String> {
    let next = link.split(',').find(|l| l.contains("rel=\"next\""))?;
    Some(next.split_once('<')?.1.split_once('>')?.0.to_string())
}

/// Percent-encodes what a URL's path cannot hold.
fn escape(text: &str) -> String {
    let mut out = String::new();
    for b in text.bytes() {
        if b.is_ascii_alphanumeric() || b"-._~".contains(&b) {
            out.push(b as char);
        } else {
            out.push_str(&format!("%{b:02X}"));
        }
    }
    out
}

fn as_sha256(text: &str) -> Option<String> {
    let text = text.trim_start_matches("W/").trim_matches('"');
    (text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit())).then(|| text.to_ascii_lowercase())
}

fn listing(json: &[u8]) -> Result<Vec<Listed>> {
    let items: Vec<serde_json::Value> = serde_json::from_slice(json)?;
    let mut files = Vec::new();
    for item in items.iter().filter(|item| item["type"] == "file") {
        let text = |value: &serde_json::Value| value.as_str().map(String::from);
        let (Some(path), Some(size)) = (text(&item["path"]), item["size"].as_u64()) else {
            bail!("a file without path or size");
        };
        let sha256 = text(&item["lfs"]["oid"]).and_then(|oid| as_sha256(oid.trim_start_matches("sha256:")));
        let identity = sha256.clone().or_else(|| text(&item["oid"])).unwrap_or_default();
        files.push(Listed { path, size: item["lfs"]["size"].as_u64().unwrap_or(size), sha256, identity });
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls() {
        assert_eq!(origin("https://Host:443/a?b").unwrap(), "https://host");
        assert_eq!(origin("http://h:8080").unwrap(), "http://h:8080");
        for bad in ["host/a", "ftp://h/", "https:///a", "https://user@evil/", "https://a\\b/"] {
            assert!(origin(bad).is_err(), "{bad}");
        }
        let base = "https://h/a/b?x=/y";
        assert_eq!(join(base, "https://o/z").unwrap(), "https://o/z");
        assert_eq!(join(base, "//o/z").unwrap(), "https://o/z");
        assert_eq!(join(base, "/z").unwrap(), "https://h/z");
        assert_eq!(join(base, "z").unwrap(), "https://h/a/z");
        assert_eq!(escape("a b#é"), "a%20b%23%C3%A9");
        assert_eq!(next_page("<https://h/?p=2>; rel=\"next\"").unwrap(), "https://h/?p=2");
        assert_eq!(next_page("<https://h/?p=2>; rel=\"prev\""), None);
    }

    #[test]
    fn listings() {
        let sha = "ab".repeat(32);
        let json = format!(
            r#"[{{"type":"directory","path":"d","oid":"1","size":0}},
               {{"type":"file","path":"config.json","oid":"f00","size":7}},
               {{"type":"file","path":"m.gguf","oid":"f01","size":134,"lfs":{{"oid":"{sha}","size":9,"pointerSize":134}}}}]"#
        );
        let files = listing(json.as_bytes()).unwrap();
        assert_eq!(files.len(), 2);
        assert_eq!((files[0].identity.as_str(), files[0].size, &files[0].sha256), ("f00", 7, &None));
        assert_eq!((files[1].identity.as_str(), files[1].size), (sha.as_str(), 9));
        assert!(listing(b"<html>").is_err());
        assert!(listing(br#"[{"type":"file","path":3,"size":1}]"#).is_err());
    }
}
