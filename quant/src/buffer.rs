//! Memory that the kernels like: zeroed and aligned to a cache line. What is large comes from the system and goes back to
//! it as a whole: a heap would keep the holes between what is still in use.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// Plain numbers for which all-zero bytes are a valid value.
///
/// # Safety
/// The type is `Copy`, has no padding and no invalid bit patterns, and is aligned to at most 64 bytes.
pub unsafe trait Number: Copy + Send + Sync + 'static {}
// SAFETY: primitive numbers satisfy all of the above.
unsafe impl Number for f32 {}
// SAFETY: as above.
unsafe impl Number for i32 {}
// SAFETY: as above.
unsafe impl Number for u16 {}
// SAFETY: as above.
unsafe impl Number for i16 {}
// SAFETY: as above.
unsafe impl Number for i8 {}
// SAFETY: as above.
unsafe impl Number for u8 {}

/// A fixed-length buffer of numbers that starts on a 64-byte boundary: matrix units read a tile row per cache line,
/// and pay fourfold when it straddles two.
pub struct Aligned<T: Number> {
    start: NonNull<T>,
    len: usize,
}

// SAFETY: the buffer owns its memory and `T` is `Send`.
unsafe impl<T: Number> Send for Aligned<T> {}
// SAFETY: shared access only reads.
unsafe impl<T: Number> Sync for Aligned<T> {}

impl<T: Number> Aligned<T> {
    /// `len` zeros. The pages are taken from the system as they are first touched.
    pub fn zeroed(len: usize) -> Self {
        if len == 0 {
            return Aligned { start: NonNull::dangling(), len };
        }
        let layout = Self::layout(len);
        let Some(start) = allocate(layout) else { handle_alloc_error(layout) };
        Aligned { start: start.cast(), len }
    }

    /// `len` zeros, or `None` where the system has no room for them.
    pub fn try_zeroed(len: usize) -> Option<Self> {
        if len == 0 {
            return Some(Self::zeroed(0));
        }
        let layout = Layout::from_size_align(len.checked_mul(size_of::<T>())?, 64).ok()?;
        Some(Aligned { start: allocate(layout)?.cast(), len })
    }

    /// Makes room for `len` numbers; the contents are then unspecified (but initialised).
    pub fn reserve(&mut self, len: usize) {
        if self.len < len {
            *self = Self::zeroed(len);
        }
    }

    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len.checked_mul(size_of::<T>()).expect("buffer size overflows"), 64)
            .expect("buffer size overflows")
    }
}

/// Bytes from which on memory is asked of the system itself.
const LARGE: usize = 1 << 20;

/// Zeros.
fn allocate(layout: Layout) -> Option<NonNull<u8>> {
    #[cfg(unix)]
    if layout.size() >= LARGE {
        return map(layout.size());
    }
    // SAFETY: the layout has a non-zero size.
    NonNull::new(unsafe { alloc_zeroed(layout) })
}

/// Zeros from the system. What is as large as a huge page begins with one, and asks for them: rows far apart are then
/// found without a walk through the tables of pages for each.
#[cfg(unix)]
fn map(size: usize) -> Option<NonNull<u8>> {
    let (protection, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let spare = if cfg!(target_os = "linux") && size >= HUGE { HUGE } else { 0 };
    // SAFETY: a new map of memory that nobody else has; pages are aligned to more than 64 bytes.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), size.checked_add(spare)?, protection, kind, -1, 0) };
    let start = NonNull::new(start.cast::<u8>()).filter(|_| start != libc::MAP_FAILED)?;
    #[cfg(target_os = "linux")]
    if spare > 0 {
        let front = start.as_ptr().align_offset(HUGE);
        let page = page();
        let end = (front + size).next_multiple_of(page);
        let all = (size + spare).next_multiple_of(page);
        // SAFETY: the parts of the new map in front of and behind what is used; that the rest may lie in huge pages changes
        // nothing of what it holds.
        unsafe {
            let at = |offset: usize| start.as_ptr().add(offset).cast::<libc::c_void>();
            if front > 0 {
                libc::munmap(at(0), front);
            }
            if end < all {
                libc::munmap(at(end), all - end);
            }
            libc::madvise(at(front), size, libc::MADV_HUGEPAGE);
            return Some(start.add(front));
        }
    }
    Some(start)
}

/// Bytes of a huge page.
#[cfg(unix)]
const HUGE: usize = 2 << 20;

/// Bytes of a page.
#[cfg(target_os = "linux")]
fn page() -> usize {
    // SAFETY: asks for a number.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

/// Gives back what [`allocate`] gave.
///
/// # Safety
/// `start` is from `allocate` with the same `layout`, and nobody uses it any more.
unsafe fn free(start: NonNull<u8>, layout: Layout) {
    #[cfg(unix)]
    if layout.size() >= LARGE {
        // SAFETY: a map of this size begins there, by the caller's word.
        unsafe { libc::munmap(start.as_ptr().cast(), layout.size()) };
        return;
    }
    // SAFETY: allocated with this layout, by the caller's word.
    unsafe { dealloc(start.as_ptr(), layout) }
}

impl<T: Number> Default for Aligned<T> {
    fn default() -> Self {
        Self::zeroed(0)
    }
}

impl<T: Number> Clone for Aligned<T> {
    fn clone(&self) -> Self {
        let mut copy = Self::zeroed(self.len);
        copy.copy_from_slice(self);
        copy
    }
}

impl<T: Number> std::fmt::Debug for Aligned<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Aligned({} numbers)", self.len)
    }
}

impl<T: Number> Drop for Aligned<T> {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: allocated by `zeroed` or `try_zeroed` with this layout.
            unsafe { free(self.start.cast(), Self::layout(self.len)) }
        }
    }
}

impl<T: Number> Deref for Aligned<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: `len` initialised numbers start here (zero bytes are valid numbers).
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T: Number> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}
