//! TensorBoard's event files: TFRecords, each the protobuf message `Event` with one scalar.

use anyhow::{Context, Result};
use rushlight_models::checkpoint::AtomicFile;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

/// An event file that grows.
#[derive(Debug)]
pub struct Events {
    path: PathBuf,
    file: File,
}

/// A value of a curve.
#[derive(Clone, Copy, Debug)]
pub struct Scalar<'a> {
    /// The curve's name.
    pub tag: &'a str,
    /// The step.
    pub step: u64,
    /// The value.
    pub value: f32,
    /// Seconds since 1970.
    pub time: f64,
}

impl Events {
    /// Begins the event file of `dir` anew with what is known already: the one that is there is replaced.
    pub fn create(dir: &Path, time: f64, known: &[Scalar<'_>]) -> Result<Events> {
        let entries = std::fs::read_dir(dir).with_context(|| dir.display().to_string())?;
        let own = entries.flatten().map(|e| e.path()).find(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with("events.out.tfevents.") && name.ends_with(".rushlight")
        });
        let path = own.unwrap_or_else(|| dir.join(format!("events.out.tfevents.{:010}.rushlight", time as u64)));
        let mut file = AtomicFile::create(&path)?;
        let mut bytes = record(&start(time));
        known.iter().for_each(|scalar| bytes.extend(record(&message(scalar))));
        file.write_all(&bytes).with_context(|| path.display().to_string())?;
        file.commit()?;
        let file = OpenOptions::new().append(true).open(&path).with_context(|| path.display().to_string())?;
        Ok(Events { path, file })
    }

    /// Adds values.
    pub fn add(&mut self, scalars: &[Scalar<'_>]) -> Result<()> {
        let bytes: Vec<u8> = scalars.iter().flat_map(|scalar| record(&message(scalar))).collect();
        self.file.write_all(&bytes).with_context(|| self.path.display().to_string())
    }
}

/// The first event: which version of the format follows.
fn start(time: f64) -> Vec<u8> {
    let mut event = vec![0x09];
    event.extend(time.to_le_bytes());
    bytes(&mut event, 3, b"brain.Event:2");
    event
}

/// `Event { wall_time = 1: double, step = 2: int64, summary = 5 }` with a
/// `Summary { value = 1: Value { tag = 1, simple_value = 2: float } }`.
fn message(scalar: &Scalar<'_>) -> Vec<u8> {
    let mut value = Vec::new();
    bytes(&mut value, 1, scalar.tag.as_bytes());
    value.push(0x15);
    value.extend(scalar.value.to_le_bytes());
    let mut summary = Vec::new();
    bytes(&mut summary, 1, &value);
    let mut event = vec![0x09];
    event.extend(scalar.time.to_le_bytes());
    event.push(0x10);
    varint(&mut event, scalar.step);
    bytes(&mut event, 5, &summary);
    event
}

/// A field of bytes.
fn bytes(out: &mut Vec<u8>, field: u8, data: &[u8]) {
    out.push(field << 3 | 2);
    varint(out, data.len() as u64);
    out.extend(data);
}

fn varint(out: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

/// A TFRecord: the length and the data, each followed by its masked CRC-32C.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut out = length.to_vec();
    out.extend(masked(&length).to_le_bytes());
    out.extend(data);
    out.extend(masked(data).to_le_bytes());
    out
}

fn masked(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32 with Castagnoli's polynomial, bit by bit: there is little to check.
fn crc32c(data: &[u8]) -> u32 {
    let step = |crc: u32| (crc >> 1) ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 };
    !data.iter().fold(!0u32, |crc, &byte| (0..8).fold(crc ^ u32::from(byte), |crc, _| step(crc)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_of_the_standard() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        // The first bytes of every event file: a record of 24 bytes.
        assert_eq!(record(&start(1.0))[..12], [24, 0, 0, 0, 0, 0, 0, 0, 0xa3, 0x7f, 0x4b, 0x22]);
    }

    #[test]
    fn a_scalar_as_tensorboard_reads_it() {
        let event = message(&Scalar { tag: "loss", step: 300, value: 1.5, time: 2.0 });
        let mut want = vec![0x09];
        want.extend(2.0f64.to_le_bytes());
        want.extend([0x10, 0xac, 0x02, 0x2a, 13, 0x0a, 11, 0x0a, 4]);
        want.extend(b"loss");
        want.push(0x15);
        want.extend(1.5f32.to_le_bytes());
        assert_eq!(event, want);
    }

    #[test]
    fn a_file_is_begun_anew_under_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let scalar = Scalar { tag: "loss", step: 1, value: 2.0, time: 10.0 };
        let mut events = Events::create(dir.path(), 10.0, &[]).unwrap();
        (0..3).for_each(|_| events.add(&[scalar]).unwrap());
        drop(events);
        Events::create(dir.path(), 99.0, &[scalar]).unwrap();
        let names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["events.out.tfevents.0000000010.rushlight"]);
        let size = std::fs::metadata(dir.path().join(&names[0])).unwrap().len() as usize;
        assert_eq!(size, record(&start(99.0)).len() + record(&message(&scalar)).len());
    }
}
