use memmap2::Mmap;
use std::ops::{Deref, Range};
use std::sync::Arc;

/// A cheap, shared window into bytes that live in a mapped file or in memory.
#[derive(Clone)]
pub struct Bytes {
    owner: Arc<dyn Owner>,
    range: Range<usize>,
}

trait Owner: Send + Sync {
    fn all(&self) -> &[u8];
    /// See [`Bytes::release`].
    fn release(&self, _range: Range<usize>) {}
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

impl Bytes {
    /// All the bytes of `owner`.
    pub fn new(owner: impl AsRef<[u8]> + Send + Sync + 'static) -> Self {
        Bytes { range: 0..owner.as_ref().len(), owner: Arc::new(InMemory(owner)) }
    }

    /// All the bytes of a mapped file.
    pub(super) fn mapped(map: Mmap) -> Self {
        Bytes { range: 0..map.len(), owner: Arc::new(map) }
    }

    /// The window `range` of this window; `None` where it does not fit.
    pub fn slice(&self, range: Range<usize>) -> Option<Bytes> {
        if range.start > range.end || range.end > self.len() {
            return None;
        }
        let start = self.range.start + range.start;
        Some(Bytes { owner: self.owner.clone(), range: start..start + range.len() })
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
