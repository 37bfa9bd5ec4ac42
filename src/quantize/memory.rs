//! How much memory may be used.

/// Bytes of memory that this process may use at most: the machine's, or less where a container is given less. A guess of
/// 8 GB where the system does not say.
pub fn total() -> u64 {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let kilobytes = |text: String| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:").map(str::to_owned))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    };
    let machine = if cfg!(target_os = "macos") {
        let said = std::process::Command::new("sysctl").args(["-n", "hw.memsize"]).output().ok();
        said.and_then(|said| String::from_utf8(said.stdout).ok()?.trim().parse().ok())
    } else {
        read("/proc/meminfo").and_then(kilobytes).map(|kb| kb * 1024)
    };
    let container = read("/sys/fs/cgroup/memory.max").and_then(|text| text.trim().parse().ok()).unwrap_or(u64::MAX);
    machine.unwrap_or(8_000_000_000).min(container)
}

/// Reads `3.5GB`, `800MB`, `4GiB`, `4G` or a number of bytes. Units count by thousands unless they have an i.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("'{}' is not a size: give one like 3.5GB or 800MB", text.escape_debug());
    let number = text.trim().trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = text.trim()[number.len()..].to_ascii_lowercase();
    let (power, base) = match unit.as_str() {
        "" | "b" => (0, 1000u64),
        "k" | "kb" => (1, 1000),
        "m" | "mb" => (2, 1000),
        "g" | "gb" => (3, 1000),
        "t" | "tb" => (4, 1000),
        "kib" => (1, 1024),
        "mib" => (2, 1024),
        "gib" => (3, 1024),
        "tib" => (4, 1024),
        _ => return Err(wrong()),
    };
    let number: f64 = number.trim().parse().map_err(|_| wrong())?;
    let bytes = number * base.pow(power) as f64;
    if !(1.0..1e18).contains(&bytes) {
        return Err(wrong());
    }
    Ok(bytes as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_as_people_write_them() {
        let ok =
            [("3.5GB", 3_500_000_000), ("800mb", 800_000_000), ("4GiB", 4 << 30), (" 2 G ", 2_000_000_000), ("12", 12)];
        for (text, bytes) in ok {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for bad in ["", "GB", "-1GB", "1XB", "nanGB", "infGB", "1e30GB", "0"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
        assert!(total() > 100_000_000);
    }
}
