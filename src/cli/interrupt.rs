//! Ctrl-C, and the system's ways to end a program (SIGTERM, SIGHUP).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Set by any of them; with `twice_ends`, another one while it is still set ends the program. Where no handler can be
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

/// Set when that happens while `busy`; at other times it ends the program.
pub fn flag_while(busy: Arc<AtomicBool>) -> Arc<AtomicBool> {
    let flag = Arc::new(AtomicBool::new(false));
    let set = flag.clone();
    ctrlc::set_handler(move || match busy.load(Ordering::SeqCst) {
        true => set.store(true, Ordering::SeqCst),
        false => std::process::exit(130),
    })
    .ok();
    flag
}
