use super::prequantized::in_parallel;
use memmap2::Mmap;
use rushlight_quant::buffer::Aligned;
use std::ops::{Deref, Range};
use std::sync::{Arc, OnceLock};

/// A cheap, shared window into bytes that live in a mapped file or in memory, or are made when they are first looked at.
#[derive(Clone)]
pub struct Bytes {
    owner: Arc<dyn Owner>,
    range: Range<usize>,
}

trait Owner: Send + Sync {
    fn all(&self) -> &[u8];
    /// See [`Bytes::release`].
    fn release(&self, _range: Range<usize>) {}
    /// Itself, where it makes its bytes.
    fn made(&self) -> Option<&Made> {
        None
    }
}

struct InMemory<T>(T);

impl<T: AsRef<[u8]> + Send + Sync> Owner for InMemory<T> {
    fn all(&self) -> &[u8] {
        self.0.as_ref()
    }
}

impl Owner for Mmap {
    fn all(&self) -> &[u8] {
        self
    }

    #[cfg(unix)]
    fn release(&self, range: Range<usize>) {
        // SAFETY: the map is of a file and read-only: a page let go is read again from the file when next looked at.
        // That advice is not taken changes nothing but the memory in use.
        let _ = unsafe { self.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len()) };
    }
}

/// What rows of bytes are made of, each for itself.
pub(super) trait Rows: Send + Sync {
    /// Length of a row.
    fn row_bytes(&self) -> usize;
    /// Makes row `row`.
    fn make(&self, row: usize, out: &mut [u8]);
    /// The rows `rows` have been made: what they are made of will not be needed soon.
    fn let_go(&self, rows: Range<usize>);
}

/// Some rows, made when they are first looked at and then kept: of a model's experts those that no token is routed to
/// take no memory.
struct Made {
    source: Arc<dyn Rows>,
    which: Which,
    bytes: OnceLock<Aligned<u8>>,
}

#[derive(Clone)]
enum Which {
    Range(Range<usize>),
    Order(Vec<u32>),
}

impl Which {
    fn len(&self) -> usize {
        match self {
            Which::Range(range) => range.len(),
            Which::Order(order) => order.len(),
        }
    }

    fn row(&self, i: usize) -> usize {
        match self {
            Which::Range(range) => range.start + i,
            Which::Order(order) => order[i] as usize,
        }
    }
}

impl Owner for Made {
    fn all(&self) -> &[u8] {
        self.bytes.get_or_init(|| self.make())
    }

    fn made(&self) -> Option<&Made> {
        Some(self)
    }
}

impl Made {
    fn bytes(source: &Arc<dyn Rows>, which: Which) -> Bytes {
        let len = which.len() * source.row_bytes();
        let owner = Made { source: source.clone(), which, bytes: OnceLock::new() };
        Bytes { owner: Arc::new(owner), range: 0..len }
    }

    fn make(&self) -> Aligned<u8> {
        const AT_ONCE: usize = 64;
        let (rows, row_bytes) = (self.which.len(), self.source.row_bytes());
        let mut bytes = Aligned::zeroed(rows * row_bytes);
        if bytes.is_empty() {
            return bytes;
        }
        // A small matrix is done before a thread has started.
        let most = bytes.len() >> 18;
        in_parallel(bytes.chunks_mut(AT_ONCE * row_bytes).enumerate(), most, &|(i, part)| {
            for (j, row) in part.chunks_exact_mut(row_bytes).enumerate() {
                self.source.make(self.which.row(i * AT_ONCE + j), row);
            }
        });
        let made = || (0..rows).map(|i| self.which.row(i));
        self.source.let_go(made().min().unwrap_or(0)..made().max().map_or(0, |last| last + 1));
        bytes
    }
}

impl Bytes {
    /// All the bytes of `owner`.
    pub fn new(owner: impl AsRef<[u8]> + Send + Sync + 'static) -> Self {
        Bytes { range: 0..owner.as_ref().len(), owner: Arc::new(InMemory(owner)) }
    }

    /// All the bytes of a mapped file.
    pub(super) fn mapped(map: Mmap) -> Self {
        Bytes { range: 0..map.len(), owner: Arc::new(map) }
    }

    /// The rows `0..rows` of `source`, which are made when they are first looked at. Windows make their own rows.
    pub(super) fn made(source: Arc<dyn Rows>, rows: usize) -> Self {
        Made::bytes(&source, Which::Range(0..rows))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// The window `range` of this window; `None` where it does not fit.
    pub fn slice(&self, range: Range<usize>) -> Option<Bytes> {
        if range.start > range.end || range.end > self.len() {
            return None;
        }
        let range = self.range.start + range.start..self.range.start + range.end;
        if let Some(made) = self.owner.made().filter(|made| made.bytes.get().is_none()) {
            let size = made.source.row_bytes();
            let rows = range.start / size..range.end.div_ceil(size);
            let which = match &made.which {
                Which::Range(all) => Which::Range(all.start + rows.start..all.start + rows.end),
                Which::Order(order) => Which::Order(order[rows.clone()].to_vec()),
            };
            let start = range.start - rows.start * size;
            return Some(Bytes { range: start..start + range.len(), ..Made::bytes(&made.source, which) });
        }
        Some(Bytes { owner: self.owner.clone(), range })
    }

    /// The rows `rows` of these bytes, which are whole rows of `row_bytes` each: a copy, but of rows that are yet to be
    /// made, which stay so.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn rows(&self, row_bytes: usize, rows: &[usize]) -> Bytes {
        let unmade =
            self.owner.made().filter(|made| made.bytes.get().is_none() && made.source.row_bytes() == row_bytes);
        if let Some(made) = unmade.filter(|_| self.range.start.is_multiple_of(row_bytes)) {
            let first = self.range.start / row_bytes;
            let which = rows.iter().map(|row| made.which.row(first + row) as u32).collect();
            return Made::bytes(&made.source, Which::Order(which));
        }
        Bytes::new(
            rows.iter().flat_map(|row| self[row * row_bytes..][..row_bytes].iter().copied()).collect::<Vec<u8>>(),
        )
    }

    /// The same bytes, for those who look at them once: what has to be made is not kept here.
    pub fn passing(&self) -> Bytes {
        match self.owner.made() {
            Some(made) if made.bytes.get().is_none() => {
                Bytes { range: self.range.clone(), ..Made::bytes(&made.source, made.which.clone()) }
            }
            _ => self.clone(),
        }
    }

    /// Says that these bytes will not be needed soon: what a mapped file holds of this process's memory for them is given
    /// back. They stay valid, and are read from the file again when they are looked at.
    pub fn release(&self) {
        if !self.range.is_empty() {
            self.owner.release(self.range.clone());
        }
    }
}

impl Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.owner.all()[self.range.clone()]
    }
}

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bytes({})", self.len())
    }
}
