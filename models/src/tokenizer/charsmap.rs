use std::ops::Range;

/// SentencePiece's table of replacements (`precompiled_charsmap`): a double-array trie from strings to their
/// replacements, which follow it, each ended by a NUL.
pub struct Charsmap {
    units: Vec<u32>,
    replacements: String,
}

impl Charsmap {
    /// Reads the table. `None` where it is not one.
    pub fn parse(bytes: &[u8]) -> Option<Charsmap> {
        let (size, rest) = bytes.split_first_chunk::<4>()?;
        let size = u32::from_le_bytes(*size) as usize;
        if !size.is_multiple_of(4) || size == 0 || size > rest.len() {
            return None;
        }
        let (trie, text) = rest.split_at(size);
        let units = trie.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
        Some(Charsmap { units, replacements: std::str::from_utf8(text).ok()?.to_string() })
    }

    /// The table as [`Charsmap::parse`] reads it.
    pub fn bytes(&self) -> Vec<u8> {
        let size = (self.units.len() * 4) as u32;
        let trie = self.units.iter().flat_map(|u| u.to_le_bytes());
        size.to_le_bytes().into_iter().chain(trie).chain(self.replacements.bytes()).collect()
    }

    /// Whether no text can lead out of the trie or to a replacement that is not there. The `tokenizers` crate indexes
    /// without asking, so a table from a file must pass this first.
    pub fn is_sound(&self) -> bool {
        let Some(&root) = self.units.first() else { return false };
        let mut seen = vec![false; self.units.len()];
        let mut todo = vec![offset(root)];
        while let Some(base) = todo.pop() {
            if base | 0xFF >= self.units.len() {
                return false;
            }
            for byte in 1..=255usize {
                let node = base ^ byte;
                let unit = self.units[node];
                if label(unit) != byte as u32 {
                    continue;
                }
                let below = node ^ offset(unit);
                if has_leaf(unit) && self.units.get(below).and_then(|&u| self.replacement(u)).is_none() {
                    return false;
                }
                if !std::mem::replace(&mut seen[node], true) {
                    todo.push(below);
                }
            }
        }
        true
    }

    /// The replacement of the longest beginning of `text` that has one, and that beginning's length.
    fn longest(&self, text: &[u8]) -> Option<(&str, usize)> {
        let mut node = offset(*self.units.first()?);
        let mut best = None;
        for (k, &byte) in text.iter().enumerate() {
            node ^= usize::from(byte);
            let unit = *self.units.get(node)?;
            if byte == 0 || label(unit) != u32::from(byte) {
                break;
            }
            node ^= offset(unit);
            if has_leaf(unit) {
                best = Some((self.replacement(*self.units.get(node)?)?, k + 1));
            }
        }
        best
    }

    fn replacement(&self, leaf: u32) -> Option<&str> {
        let text = self.replacements.get((leaf & 0x7FFF_FFFF) as usize..)?;
        text.split('\0').next()
    }

    /// `text` with everything replaced, longest match first.
    pub fn apply(&self, text: &str) -> String {
        let mut out = String::with_capacity(text.len());
        let mut at: Range<usize> = 0..text.len();
        while let Some(c) = text[at.clone()].chars().next() {
            match self.longest(&text.as_bytes()[at.clone()]) {
                // Only at a character's border, and only as long as tables in use have them (the longest is 33
                // bytes): a hostile one must not blow a text up.
                Some((new, len)) if text.is_char_boundary(at.start + len) && new.len() <= 64 => {
                    out.push_str(new);
                    at.start += len;
                }
                _ => {
                    out.push(c);
                    at.start += c.len_utf8();
                }
            }
        }
        out
    }
}

fn has_leaf(unit: u32) -> bool {
    unit >> 8 & 1 == 1
}

fn label(unit: u32) -> u32 {
    unit & 0x8000_00FF
}

fn offset(unit: u32) -> usize {
    ((unit >> 10) << ((unit & 1 << 9) >> 6)) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A trie of one-byte keys: the root's children sit in the block at 256.
    fn table(entries: &[(u8, &str)]) -> Vec<u8> {
        let mut units = vec![0u32; 512 + 256 * entries.len()];
        units[0] = 256 << 10;
        let mut text = String::new();
        for (k, &(byte, new)) in entries.iter().enumerate() {
            let node = 256 ^ usize::from(byte);
            let below = 512 + 256 * k;
            units[node] = u32::from(byte) | 1 << 8 | ((node ^ below) as u32) << 10;
            units[below] = 1 << 31 | text.len() as u32;
            text.push_str(new);
            text.push('\0');
        }
        let mut bytes = (units.len() as u32 * 4).to_le_bytes().to_vec();
        bytes.extend(units.iter().flat_map(|u| u.to_le_bytes()));
        bytes.extend(text.bytes());
        bytes
    }

    #[test]
    fn replaces_what_the_table_holds() {
        let map = Charsmap::parse(&table(&[(b'\t', " "), (b'x', "two")])).unwrap();
        assert!(map.is_sound());
        assert_eq!(map.apply("a\txé"), "a twoé");
    }

    #[test]
    fn a_table_that_points_outside_is_not_sound() {
        let mut bytes = table(&[(b'x', "y")]);
        let leaf = 4 + 512 * 4;
        bytes[leaf..leaf + 4].copy_from_slice(&(1u32 << 31 | 9999).to_le_bytes());
        let map = Charsmap::parse(&bytes).unwrap();
        assert!(!map.is_sound());
        assert_eq!(map.apply("x"), "x");
        bytes[4..8].copy_from_slice(&(0x3FFFFFu32 << 10).to_le_bytes());
        assert!(!Charsmap::parse(&bytes).unwrap().is_sound());
        assert!(Charsmap::parse(&[255; 8]).is_none() && Charsmap::parse(&[]).is_none());
    }
}
