//! Hints for the processor's cache. Any address will do: a hint neither faults nor changes anything.

use std::sync::LazyLock;

/// Asks for a cache line, to read it soon.
#[inline(always)]
pub(crate) fn prefetch_read<T>(place: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch neither faults nor changes anything.
    unsafe {
        core::arch::x86_64::_mm_prefetch::<{ core::arch::x86_64::_MM_HINT_T0 }>(place.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = place;
}

/// Asks for a cache line and takes it away from other CPUs, to write it soon.
#[inline(always)]
pub(crate) fn prefetch_write<T>(place: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: as above. It has no intrinsic on the baseline processor, where it does nothing.
    unsafe {
        std::arch::asm!("prefetchw [{}]", in(reg) place, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = place;
}

/// Whether it pays to ask for all lines that a copy will write before it begins. It did on the one of Intel's processors that was
/// measured, and cost something on AMD's (docs/performance.md).
#[inline]
pub(crate) fn write_hints_pay() -> bool {
    static IS_INTEL: LazyLock<bool> = LazyLock::new(is_intel);
    *IS_INTEL
}

/// Whether the processor says that it is one of Intel's.
fn is_intel() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        let vendor = core::arch::x86_64::__cpuid(0);
        [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).as_flattened() == b"GenuineIntel"
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}
