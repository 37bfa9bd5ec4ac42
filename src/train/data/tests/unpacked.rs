//! Compressed files that would take absurdly much memory.

use super::{Room, fixture};
use std::fs;

/// Sets the size that the archive states for each of its parts, where a part begins and in the directory.
fn state(archive: &mut [u8], size: u32) {
    for (mark, at) in [(b"PK\x03\x04", 22), (b"PK\x01\x02", 24)] {
        let places: Vec<usize> = (0..archive.len() - 30).filter(|&i| archive[i..].starts_with(mark)).collect();
        assert!(!places.is_empty());
        for place in places {
            archive[place + at..place + at + 4].copy_from_slice(&size.to_le_bytes());
        }
    }
}

#[test]
fn spreadsheets_that_unpack_to_gigabytes_are_refused() {
    let room = Room::new();
    let mut archive = fs::read(fixture("questions.xlsx")).unwrap();
    state(&mut archive, 2_000_000_000);
    let e = room.refusal("a.xlsx", &archive);
    assert!(e.contains("a.xlsx: this spreadsheet would unpack to") && e.contains("save the sheet as .csv"), "{e}");
    // One that says less than is true is found out.
    state(&mut archive, 10);
    let e = room.refusal("a.xlsx", &archive);
    assert!(e.contains("a.xlsx") && e.contains("larger than its declared uncompressed size"), "{e}");
}

#[cfg(feature = "parquet")]
#[test]
fn pages_that_would_take_gigabytes_are_refused() {
    let room = Room::new();
    // A billion, in the place of the one byte of a number in the header of the first page, which is a dictionary.
    let billion = [0x80, 0xa8, 0xd6, 0xb9, 0x07];
    for (place, what) in [(7, "pages would take"), (12, "a dictionary of 1000000000 entries in 32 bytes")] {
        let mut file = fs::read(fixture("messages-snappy.parquet")).unwrap();
        file.splice(place..=place, billion);
        let e = room.refusal("a.parquet", &file);
        assert!(e.contains("a.parquet") && e.contains("row group 0, column") && e.contains(what), "{e}");
    }
    // Less than the first page unpacks to.
    let mut file = fs::read(fixture("ids-gzip.parquet")).unwrap();
    file[7] = 2;
    let e = room.refusal("b.parquet", &file);
    assert!(e.contains("damaged: a"), "{e}");
}
