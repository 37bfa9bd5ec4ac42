//! Ctrl-C.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Set by Ctrl-C; with `twice_ends`, another one while it is still set ends the program. Where no handler can be
/// installed, Ctrl-C ends the program as ever.
pub fn flag(twice_ends: bool) -> Arc<AtomicBool> {
    let flag = Arc::new(AtomicBool::new(false));
    let set = flag.clone();
    ctrlc::set_handler(move || {
        if set.swap(true, Ordering::SeqCst) && twice_ends {
            std::process::exit(130);
        }
    })
    .ok();
    flag
}
