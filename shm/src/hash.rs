//! The frozen hashes: of keys (they decide where state lives, on disk too) and of layouts.
//!
//! Invariants: the golden vectors below never change; a new function needs a new name and a new
//! format version. Called by the state crate (slots), by the exchange (routing) and by the plan
//! (schema and plan hashes).

use xxhash_rust::xxh3::xxh3_64;

const MULTIPLIER: u64 = 0x9E37_79B9_7F4A_7C15;
const SEED: u64 = 0x2D35_8DCC_AA6C_78A5;

/// Hash of a key's canonical bytes. Eight bytes (most keys) take one widening multiplication.
#[inline(always)]
#[must_use]
pub fn key_hash(bytes: &[u8]) -> u64 {
    if let Ok(eight) = <[u8; 8]>::try_from(bytes) {
        return mix(u64::from_le_bytes(eight) ^ SEED);
    }
    if bytes.len() < 8 {
        let mut word = [0u8; 8];
        word[..bytes.len()].copy_from_slice(bytes);
        return mix(u64::from_le_bytes(word) ^ SEED.rotate_left(bytes.len() as u32));
    }
    xxh3_64(bytes)
}

/// Folds a 64-bit word through a 128-bit product; every input bit reaches both halves of the
/// result.
#[inline(always)]
fn mix(word: u64) -> u64 {
    let product = u128::from(word) * u128::from(MULTIPLIER);
    let folded = (product as u64) ^ ((product >> 64) as u64);
    folded.wrapping_mul(0xD6E8_FEB8_6659_FD93) ^ (folded >> 32)
}

/// Hash of a name in a cell or root directory.
#[must_use]
pub fn name_hash(name: &str) -> u64 {
    xxh3_64(name.as_bytes()) | 1
}

/// Hash of a layout from its name and the hashes of its parts.
#[must_use]
pub fn schema(name: &str, parts: &[u64]) -> u64 {
    let mut all = Vec::with_capacity(name.len() + parts.len() * 8);
    all.extend_from_slice(name.as_bytes());
    for part in parts {
        all.extend_from_slice(&part.to_le_bytes());
    }
    xxh3_64(&all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_vectors_of_the_key_hash_never_change() {
        let rising: [u8; 32] = std::array::from_fn(|index| index as u8 + 1);
        let golden: [(&[u8], u64); 14] = [
            (&[], 0xA54B_A69B_D99C_4D78),
            (&[0], 0x4A97_4D37_B338_9AF1),
            (&[0, 0], 0x6C17_9926_CCD7_3351),
            (&rising[..1], 0x49A8_0919_EE70_CF64),
            (&rising[..7], 0x0CE4_D16D_736A_2146),
            (&rising[..8], 0xE5E9_354E_1001_BFA9),
            (&rising[..9], 0x17D1_43E7_F447_850A),
            (&rising[..16], 0xEB5A_EB9A_3245_0F6A),
            (&rising, 0xBFD4_9BED_2D15_02EB),
            (&0u64.to_le_bytes(), 0xA54B_A69B_D99C_4D78),
            (&1u64.to_le_bytes(), 0x323D_9F09_5B32_920A),
            (&u64::MAX.to_le_bytes(), 0xF47D_E04E_7FD4_568D),
            (b"abc", 0x89A1_BE83_725B_64AD),
            (b"a longer key of bytes", 0xAB90_2238_1ADB_1067),
        ];
        for (bytes, hash) in golden {
            assert_eq!(key_hash(bytes), hash, "key {bytes:?}");
        }
    }

    #[test]
    fn golden_vectors_of_names_and_schemas_never_change() {
        assert_eq!(name_hash("count"), 0x810A_3375_1161_C4F1);
        assert_eq!(schema("u64", &[]), 0xA248_1493_B936_2FF3);
        assert_eq!(schema("tuple", &[1, 2]), 0x8ACC_489A_6C6B_1C74);
    }
}
