//! Random numbers that depend on nothing but their names.
//!
//! There is no random stream: each number is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
//! 1, 2, 3", SC 2011) of a key and a counter, so that rank, micro-batch, packing, thread and backend change nothing.
//!
//! # Counters
//! A dropout mask uses the key [`DropoutKey::philox_key`] = first two words of Philox((step low, step high, module,
//! domain), seed), and the counter (block, token in sample, sample low, sample high). Eight blocks serve 64 features, so
//! that vector lanes are neighbours: feature f takes block 8 · (f / 64) + f % 8, word (f % 64) / 16, and of that word
//! the low half where f % 16 < 8, else the high one. It is dropped where this 16-bit number is below p · 65536, rounded. A
//! CUDA kernel that follows these lines draws the same mask.

use rayon::prelude::*;

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;
/// Tells key derivation from other uses of a seed.
const DROPOUT_DOMAIN: u32 = 0x6472_6f70;
/// Blocks computed side by side; wide enough for the compiler to use vector registers.
const LANES: usize = 8;
/// Features that `LANES` blocks serve: four words a block, two features a word.
const GROUP: usize = 8 * LANES;

/// Philox4x32-10: 128 random bits for a 128-bit counter and a 64-bit key.
pub fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..ROUNDS {
        let first = u64::from(MULTIPLIERS[0]) * u64::from(counter[0]);
        let second = u64::from(MULTIPLIERS[1]) * u64::from(counter[2]);
        counter = [
            (second >> 32) as u32 ^ counter[1] ^ key[0],
            second as u32,
            (first >> 32) as u32 ^ counter[3] ^ key[1],
            first as u32,
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// [`philox4x32`] of `LANES` counters that differ in their first word: `base`, `base + 1`, …
#[inline(always)]
fn philox_lanes(base: u32, rest: [u32; 3], mut key: [u32; 2]) -> [[u32; LANES]; 4] {
    let mut counter = [[0; LANES], [rest[0]; LANES], [rest[1]; LANES], [rest[2]; LANES]];
    for (lane, word) in counter[0].iter_mut().enumerate() {
        *word = base.wrapping_add(lane as u32);
    }
    for _ in 0..ROUNDS {
        let mut next = [[0; LANES]; 4];
        for lane in 0..LANES {
            let first = u64::from(MULTIPLIERS[0]) * u64::from(counter[0][lane]);
            let second = u64::from(MULTIPLIERS[1]) * u64::from(counter[2][lane]);
            next[0][lane] = (second >> 32) as u32 ^ counter[1][lane] ^ key[0];
            next[1][lane] = second as u32;
            next[2][lane] = (first >> 32) as u32 ^ counter[3][lane] ^ key[1];
            next[3][lane] = first as u32;
        }
        counter = next;
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// What a dropout mask depends on besides sample, token and feature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DropoutKey {
    /// The job's seed.
    pub seed: u64,
    /// The optimizer step.
    pub step: u64,
    /// Which module of the model: its place in the list of all linear modules.
    pub module: u32,
}

impl DropoutKey {
    /// The Philox key under which this module's masks of this step are drawn.
    pub fn philox_key(&self) -> [u32; 2] {
        let counter = [self.step as u32, (self.step >> 32) as u32, self.module, DROPOUT_DOMAIN];
        let [first, second, ..] = philox4x32(counter, [self.seed as u32, (self.seed >> 32) as u32]);
        [first, second]
    }
}

/// Writes what each feature of one token is multiplied by: 0 with probability `p`, else 1 / (1 - p).
///
/// A pure function of its arguments: the same token of the same sample gets the same mask on any rank, in any
/// micro-batch and any place of a packed row. `out[i]` belongs to feature i. `p` counts in steps of 1/65536; with
/// `p` = 0 all are 1, with `p` ≥ 1 all are 0.
pub fn dropout_scales(key: DropoutKey, sample_id: u64, token_in_sample: u32, p: f32, out: &mut [f32]) {
    dropout_scales_with(key.philox_key(), sample_id, token_in_sample, p, out);
}

/// [`dropout_scales`] with the key of [`DropoutKey::philox_key`] already drawn: for loops over many tokens.
///
/// Always inlined, so that a caller which is compiled for wider vectors gets them here too.
#[inline(always)]
pub fn dropout_scales_with(key: [u32; 2], sample_id: u64, token_in_sample: u32, p: f32, out: &mut [f32]) {
    if p <= 0.0 {
        return out.fill(1.0);
    }
    if p >= 1.0 {
        return out.fill(0.0);
    }
    let threshold = (p * 65_536.0).round() as u32;
    let scale = 1.0 / (1.0 - p);
    let rest = [token_in_sample, sample_id as u32, (sample_id >> 32) as u32];
    let (groups, tail) = out.as_chunks_mut::<GROUP>();
    for (group, out) in groups.iter_mut().enumerate() {
        dropout_group(group, rest, key, threshold, scale, out);
    }
    if !tail.is_empty() {
        let mut whole = [0.0; GROUP];
        dropout_group(groups.len(), rest, key, threshold, scale, &mut whole);
        tail.copy_from_slice(&whole[..tail.len()]);
    }
}

/// The features of `LANES` blocks.
#[inline(always)]
fn dropout_group(
    group: usize,
    rest: [u32; 3],
    key: [u32; 2],
    threshold: u32,
    scale: f32,
    out: &mut [f32; GROUP],
) {
    let words = philox_lanes((group * LANES) as u32, rest, key);
    for (index, out) in out.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
        let (word, shift) = (&words[index / 2], 16 * (index % 2));
        for (out, word) in out.iter_mut().zip(word) {
            let half = word >> shift & 0xffff;
            *out = if half < threshold { 0.0 } else { scale };
        }
    }
}

/// Fills `out` with uniform numbers of [-bound, bound), a function of (`seed`, `name`) and the place alone.
///
/// `name` is the tensor's name in the adapter's file. The key is the first 8 bytes of BLAKE3(seed, name).
pub fn fill_uniform(seed: u64, name: &str, bound: f32, out: &mut [f32]) {
    const CHUNK: usize = 4096;
    let key = named_key(seed, name);
    out.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk_index, chunk)| {
        for (offset, block) in chunk.chunks_mut(4).enumerate() {
            let index = (chunk_index * CHUNK / 4 + offset) as u64;
            let words = philox4x32([index as u32, (index >> 32) as u32, 0, 0], key);
            for (value, word) in block.iter_mut().zip(words) {
                // 24 bits: every one of these is an f32, and 1 is not among them.
                let unit = (word >> 8) as f32 * (1.0 / 16_777_216.0);
                *value = bound * (2.0 * unit - 1.0);
            }
        }
    });
}

/// Fills `out` with normal numbers of mean 0, a function of (`seed`, `name`) and the place alone (Box and Muller).
pub fn fill_normal(seed: u64, name: &str, deviation: f32, out: &mut [f32]) {
    let key = named_key(seed, name);
    for (index, block) in out.chunks_mut(4).enumerate() {
        let index = index as u64;
        let words = philox4x32([index as u32, (index >> 32) as u32, 1, 0], key);
        // Above 0, so that the logarithm is finite.
        let unit = |word: u32| (f64::from(word) + 0.5) / 4_294_967_296.0;
        for (pair, values) in block.chunks_mut(2).enumerate() {
            let radius = (-2.0 * unit(words[2 * pair]).ln()).sqrt() * f64::from(deviation);
            let (sine, cosine) = (std::f64::consts::TAU * unit(words[2 * pair + 1])).sin_cos();
            for (value, part) in values.iter_mut().zip([cosine, sine]) {
                *value = (radius * part) as f32;
            }
        }
    }
}

fn named_key(seed: u64, name: &str) -> [u32; 2] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.update(name.as_bytes());
    let hash = hasher.finalize();
    let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| hash.as_bytes()[at + i]));
    [word(0), word(4)]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `kat_vectors` of Random123 1.14.0, lines `philox4x32 10`.
    #[test]
    fn philox_gives_the_published_known_answers() {
        let ones = u32::MAX;
        assert_eq!(philox4x32([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox4x32([ones; 4], [ones; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox4x32([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn lanes_equal_single_blocks() {
        let (rest, key) = ([7, 8, 9], [10, 11]);
        let lanes = philox_lanes(u32::MAX - 2, rest, key);
        let of = |lane: usize| lanes.map(|words| words[lane]);
        for lane in 0..LANES {
            let counter = [(u32::MAX - 2).wrapping_add(lane as u32), rest[0], rest[1], rest[2]];
            let expected = philox4x32(counter, key);
            assert_eq!(of(lane), expected);
        }
    }

    const KEY: DropoutKey = DropoutKey { seed: 17, step: 3, module: 5 };

    /// The layout that the module documentation promises to other backends.
    #[test]
    fn dropout_follows_the_documented_counters() {
        let mut mask = vec![9.0; 203];
        dropout_scales(KEY, 0x1_0000_0002, 40, 0.25, &mut mask);
        for (feature, value) in mask.iter().enumerate() {
            let block = 8 * (feature / 64) + feature % 8;
            let words = philox4x32([block as u32, 40, 2, 1], KEY.philox_key());
            let word = words[feature % 64 / 16];
            let half = if feature % 16 < 8 { word & 0xffff } else { word >> 16 };
            let expected = if half < 16_384 { 0.0 } else { 1.0 / 0.75 };
            assert_eq!(*value, expected, "feature {feature}");
        }
    }

    #[test]
    fn a_prefix_of_features_does_not_depend_on_their_number() {
        let mut long = vec![0.0; 384];
        dropout_scales(KEY, 11, 2, 0.1, &mut long);
        for length in [1, 3, 8, 63, 64, 65, 100, 192] {
            let mut short = vec![0.0; length];
            dropout_scales(KEY, 11, 2, 0.1, &mut short);
            assert_eq!(short, long[..length]);
        }
    }

    #[test]
    fn dropout_drops_its_share_and_keeps_the_mean() {
        let mut mask = vec![0.0; 1 << 16];
        for p in [0.05_f32, 0.5, 0.9] {
            dropout_scales(KEY, 1, 0, p, &mut mask);
            let dropped = mask.iter().filter(|value| **value == 0.0).count() as f64 / mask.len() as f64;
            // Five standard deviations of a binomial share.
            let allowed = 5.0 * (f64::from(p) * (1.0 - f64::from(p)) / mask.len() as f64).sqrt();
            assert!((dropped - f64::from(p)).abs() < allowed, "p {p} dropped {dropped}");
        }
        dropout_scales(KEY, 1, 0, 0.0, &mut mask);
        assert!(mask.iter().all(|value| *value == 1.0));
        dropout_scales(KEY, 1, 0, 1.0, &mut mask);
        assert!(mask.iter().all(|value| *value == 0.0));
    }

    #[test]
    fn every_argument_changes_the_mask() {
        let draw = |key, sample, token| {
            let mut mask = vec![0.0; 128];
            dropout_scales(key, sample, token, 0.5, &mut mask);
            mask
        };
        let mask = draw(KEY, 1, 1);
        assert_ne!(mask, draw(DropoutKey { seed: 18, ..KEY }, 1, 1));
        assert_ne!(mask, draw(DropoutKey { step: 4, ..KEY }, 1, 1));
        assert_ne!(mask, draw(DropoutKey { step: 3 + (1 << 32), ..KEY }, 1, 1));
        assert_ne!(mask, draw(DropoutKey { module: 6, ..KEY }, 1, 1));
        assert_ne!(mask, draw(KEY, 2, 1));
        assert_ne!(mask, draw(KEY, 1 + (1 << 32), 1));
        assert_ne!(mask, draw(KEY, 1, 2));
    }

    #[test]
    fn uniform_fill_stays_in_bounds_and_depends_on_name_and_seed() {
        let mut values = vec![0.0; 100_003];
        fill_uniform(1, "a", 0.125, &mut values);
        assert!(values.iter().all(|value| (-0.125..0.125).contains(value)));
        let mean = values.iter().map(|value| f64::from(*value)).sum::<f64>() / values.len() as f64;
        // Standard deviation of the mean: 0.125 / sqrt(3 n) = 2.3e-4.
        assert!(mean.abs() < 1.2e-3, "mean {mean}");
        let mut other = vec![0.0; 5];
        fill_uniform(1, "a", 0.125, &mut other);
        assert_eq!(other, values[..5]);
        fill_uniform(2, "a", 0.125, &mut other);
        assert_ne!(other, values[..5]);
        fill_uniform(1, "b", 0.125, &mut other);
        assert_ne!(other, values[..5]);
    }
}
