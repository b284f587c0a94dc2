//! One cache line of a table, compared at once: which of its four slots holds an eight-byte key?
//!
//! Pure arithmetic on 64 readable bytes: four slots `{key: u64, value: u64}`. Called by `slots` for
//! the table that matters most, from 64-bit keys to 64-bit values.

/// Index of the slot in the line at `line` whose key is `key`; 4 or more when there is none.
///
/// # Safety
/// 64 bytes are readable at `line`, which is 16-aligned.
#[inline(always)]
pub(crate) unsafe fn find_in_line(line: *const u8, key: u64) -> u32 {
    #[cfg(all(target_arch = "x86_64", target_feature = "avx2", not(miri)))]
    // SAFETY: two loads of 32 bytes, which the caller promises to be readable; this is compiled
    // for processors that have them.
    unsafe {
        use std::arch::x86_64::{
            _mm256_castsi256_pd, _mm256_cmpeq_epi64, _mm256_loadu_si256, _mm256_movemask_pd,
            _mm256_set1_epi64x,
        };
        let wanted = _mm256_set1_epi64x(key.cast_signed());
        let equal = |half: usize| {
            let words = _mm256_loadu_si256(line.add(half * 32).cast());
            let equal = _mm256_cmpeq_epi64(words, wanted);
            _mm256_movemask_pd(_mm256_castsi256_pd(equal)).cast_unsigned()
        };
        // Keys stand in the even words.
        ((equal(0) | equal(1) << 4) & 0b0101_0101 | 1 << 8).trailing_zeros() / 2
    }
    #[cfg(all(target_arch = "x86_64", not(target_feature = "avx2"), not(miri)))]
    // SAFETY: four aligned loads of 16 bytes, which the caller promises to be readable; SSE2 is
    // part of every x86-64.
    unsafe {
        use std::arch::x86_64::{
            __m128i, _mm_and_si128, _mm_castsi128_pd, _mm_cmpeq_epi32, _mm_load_si128,
            _mm_movemask_pd, _mm_set1_epi64x, _mm_shuffle_epi32, _mm_unpacklo_epi64,
        };
        let slots = line.cast::<__m128i>();
        let pair = |at: usize| {
            _mm_unpacklo_epi64(_mm_load_si128(slots.add(at)), _mm_load_si128(slots.add(at + 1)))
        };
        let wanted = _mm_set1_epi64x(key.cast_signed());
        // 64-bit equality is both 32-bit halves being equal.
        let equal = |pair: __m128i| {
            let halves = _mm_cmpeq_epi32(pair, wanted);
            let both = _mm_and_si128(halves, _mm_shuffle_epi32(halves, 0b1011_0001));
            _mm_movemask_pd(_mm_castsi128_pd(both)).cast_unsigned()
        };
        (equal(pair(0)) | equal(pair(2)) << 2 | 1 << 4).trailing_zeros()
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    // SAFETY: as above.
    unsafe {
        let words = line.cast::<u64>();
        (0..4).find(|slot| words.add(slot * 2).read() == key).unwrap_or(4) as u32
    }
}
