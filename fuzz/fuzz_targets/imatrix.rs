//! An importance matrix, in either form.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rushlight_models::checkpoint::Bytes;
use rushlight_models::checkpoint::imatrix::Imatrix;
use std::path::Path;

fuzz_target!(|data: &[u8]| {
    let Ok(imatrix) = Imatrix::parse(Bytes::new(data.to_vec()), Path::new("fuzz.imatrix")) else { return };
    for entry in imatrix.entries.values() {
        assert_eq!(entry.importance().len(), entry.sums.len());
        assert!(entry.importance().iter().all(|i| !i.is_nan() && *i >= 0.0));
    }
});
