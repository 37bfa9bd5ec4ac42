//! Tasks in stretches, one for each thread, and memory that waiting threads have fetched.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// The first of `tasks` that belongs to stretch `i` of `threads`.
pub(super) fn first(tasks: usize, threads: usize, i: usize) -> usize {
    tasks * i / threads
}

/// A value that shares no cache line with its neighbours.
#[repr(align(128))]
struct Alone<T>(T);

/// What is left of each thread's stretch: the next task in the upper half, the end in the lower.
pub(super) struct Stretches(Box<[Alone<AtomicU64>]>);

impl Stretches {
    pub(super) fn new(threads: usize) -> Self {
        Stretches((0..threads.max(1)).map(|_| Alone(AtomicU64::new(0))).collect())
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Cuts `tasks` into a stretch for each thread.
    ///
    /// # Panics
    /// When there are 2^32 tasks.
    pub(super) fn lay_out(&self, tasks: usize) {
        assert!(u32::try_from(tasks).is_ok(), "too many tasks");
        for (i, stretch) in self.0.iter().enumerate() {
            let (from, to) = (first(tasks, self.len(), i), first(tasks, self.len(), i + 1));
            stretch.0.store((from as u64) << 32 | to as u64, Ordering::Relaxed);
        }
    }

    /// A task for thread `me`: the next of its own, or else the last of another's.
    pub(super) fn take(&self, me: usize) -> Option<usize> {
        let next = |now: u64| (now >> 32 < now & 0xffff_ffff).then(|| now + (1 << 32));
        let last = |now: u64| (now >> 32 < now & 0xffff_ffff).then(|| now - 1);
        let (own, order) = (&self.0[me].0, Ordering::Relaxed);
        if let Ok(before) = own.fetch_update(order, order, next) {
            return Some((before >> 32) as usize);
        }
        let mut others = (1..self.len()).map(|i| &self.0[(me + i) % self.len()].0);
        let taken = others.find_map(|other| other.fetch_update(order, order, last).ok());
        taken.map(|before| (before & 0xffff_ffff) as usize - 1)
    }
}

/// Bytes that a waiting thread has fetched: they stay in the second-nearest cache until they are needed.
const MOST: usize = 256 << 10;
/// Bytes that it asks for between two looks at the gate.
const STEP: usize = 1024;

/// For each thread an address, 0 being none, and how many bytes behind it have been fetched. They are hints: nothing is
/// read from there, and it does no harm when threads see them out of step.
pub(super) struct Ahead(Box<[Alone<[AtomicUsize; 2]>]>);

impl Ahead {
    pub(super) fn new(threads: usize) -> Self {
        Ahead((0..threads.max(1)).map(|_| Alone(Default::default())).collect())
    }

    pub(super) fn set(&self, starts: &[usize]) {
        for (i, Alone([start, fetched])) in self.0.iter().enumerate() {
            start.store(starts.get(i).copied().unwrap_or(0), Ordering::Relaxed);
            fetched.store(0, Ordering::Relaxed);
        }
    }

    /// Has the next bytes for thread `me` fetched; false when there is nothing to do.
    pub(super) fn fetch(&self, me: usize) -> bool {
        let Alone([start, fetched]) = &self.0[me];
        let (start, done) = (start.load(Ordering::Relaxed), fetched.load(Ordering::Relaxed));
        if start == 0 || done >= MOST {
            return false;
        }
        for line in (0..STEP).step_by(64) {
            fetch(start.wrapping_add(done + line));
        }
        fetched.store(done + STEP, Ordering::Relaxed);
        true
    }
}

/// Has the processor bring a cache line closer. An address that is not mapped does nothing.
fn fetch(address: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 processor has it, and it cannot fault.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(std::ptr::without_provenance::<i8>(address));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}
