//! What the processor is, for where its features do not say enough.

use std::arch::x86_64::__cpuid;
use std::sync::OnceLock;

/// The family of an AMD processor (0x19: Zen 3 and 4; 0x1a: Zen 5); none of others.
pub(super) fn amd_family() -> Option<u32> {
    static ANSWER: OnceLock<Option<u32>> = OnceLock::new();
    *ANSWER.get_or_init(|| {
        let vendor = __cpuid(0);
        let amd = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).concat() == b"AuthenticAMD";
        let signature = __cpuid(1).eax;
        amd.then_some((signature >> 8 & 15) + (signature >> 20 & 255))
    })
}
