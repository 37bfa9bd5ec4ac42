//! The importance matrices that llama-imatrix wrote before it wrote GGUF (`.dat`): for each tensor a name, how often it
//! was seen, and the sum over each column of the squares that went in.

use std::ffi::CString;
use std::path::Path;

use crate::llama::Result;

/// Reads `file`: names and the mean square of each column.
pub fn read(file: &Path) -> Result<Vec<(CString, Vec<f32>)>> {
    let bytes = std::fs::read(file).map_err(|error| format!("{}: {error}", file.display()))?;
    entries(&bytes).ok_or_else(|| format!("{}: not an importance matrix in the old format (.dat)", file.display()))
}

fn entries(mut bytes: &[u8]) -> Option<Vec<(CString, Vec<f32>)>> {
    let count = number(&mut bytes)?;
    let mut entries = Vec::new();
    for _ in 0..count {
        let length = number(&mut bytes)?;
        let name = CString::new(bytes.split_off(..length)?).ok()?;
        let calls = number(&mut bytes)?.max(1) as f32;
        let length = number(&mut bytes)?.checked_mul(4)?;
        let sums = bytes.split_off(..length)?.as_chunks::<4>().0;
        entries.push((name, sums.iter().map(|sum| f32::from_le_bytes(*sum) / calls).collect()));
    }
    Some(entries)
}

/// The next 32-bit number, none negative.
fn number(bytes: &mut &[u8]) -> Option<usize> {
    let four = bytes.split_off(..4)?.first_chunk()?;
    usize::try_from(i32::from_le_bytes(*four)).ok()
}
