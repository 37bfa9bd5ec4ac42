//! Weights that few rows will meet next, fetched while others are multiplied: several rows at a time are more streams than
//! the processor follows by itself.

use super::processor::amd_family;
use std::arch::x86_64::*;
use std::sync::OnceLock;

/// How weights are fetched ahead.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Ahead {
    /// Into the nearest cache.
    Near,
    /// Into the nearest cache, past the others, since they are read once. On Zen 5 this is faster than either of the others,
    /// by a tenth to a third.
    Past,
    /// Into the second-nearest cache: on Zen 4 fetches into the nearest one wait in its few miss buffers, at half the speed. Older
    /// ones of AMD's are taken to be alike.
    Second,
}

impl Ahead {
    /// The way that this processor is fastest by.
    pub(super) fn here() -> Self {
        static ANSWER: OnceLock<Ahead> = OnceLock::new();
        *ANSWER.get_or_init(|| match amd_family() {
            Some(..=0x19) => Ahead::Second,
            Some(_) => Ahead::Past,
            None => Ahead::Near,
        })
    }

    /// While `len` bytes of each of `rows` rows at `first` are multiplied, from byte `done` on: fetches as many of the bytes that
    /// follow, as one stream, which memory is faster by than by one for each row (by a fifth, where two threads share a Zen 5's).
    /// It runs so far ahead that the last of the next rows begins in time too.
    #[inline(always)]
    pub(super) fn fetch_behind(self, first: *const u8, rows: usize, row_bytes: usize, done: usize, len: usize) {
        self.fetch(first.wrapping_add((rows - 1) * row_bytes + 8192 + rows * done), rows * len);
    }

    /// Fetches `len` bytes from `p` on, which may lie beyond the end of the weights.
    #[inline(always)]
    pub(super) fn fetch(self, p: *const u8, len: usize) {
        // SAFETY: every x86-64 processor has these; they change nothing, and do nothing at addresses that are not there.
        unsafe {
            match self {
                Ahead::Near => (0..len).step_by(64).for_each(|i| _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(i).cast())),
                Ahead::Past => {
                    (0..len).step_by(64).for_each(|i| _mm_prefetch::<_MM_HINT_NTA>(p.wrapping_add(i).cast()))
                }
                Ahead::Second => {
                    (0..len).step_by(64).for_each(|i| _mm_prefetch::<_MM_HINT_T1>(p.wrapping_add(i).cast()))
                }
            }
        }
    }
}
