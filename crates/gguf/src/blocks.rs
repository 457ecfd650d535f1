//! One block of each kind to f32, in the order of operations of ggml's `dequantize_row_…`, so that bits agree.

/// Bytes 0 and 1 as f16, widened.
pub(crate) fn f16(bytes: &[u8]) -> f32 {
    half::f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

/// Bytes 0 and 1 as bf16, widened.
pub(crate) fn bf16(bytes: &[u8]) -> f32 {
    half::bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

/// Bytes 0 to 3 as f32.
pub(crate) fn f32(bytes: &[u8]) -> f32 {
    f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

/// Lower halves of the bytes are the first 16 numbers, upper halves the others.
pub(crate) fn q4_0(block: &[u8], out: &mut [f32]) {
    let scale = f16(block);
    let (first, second) = out.split_at_mut(16);
    for ((code, first), second) in block[2..].iter().zip(first).zip(second) {
        *first = (i16::from(code & 15) - 8) as f32 * scale;
        *second = (i16::from(code >> 4) - 8) as f32 * scale;
    }
}

pub(crate) fn q4_1(block: &[u8], out: &mut [f32]) {
    let (scale, least) = (f16(block), f16(&block[2..]));
    let (first, second) = out.split_at_mut(16);
    for ((code, first), second) in block[4..].iter().zip(first).zip(second) {
        *first = f32::from(code & 15) * scale + least;
        *second = f32::from(code >> 4) * scale + least;
    }
}

/// The fifth bits of 32 numbers lie ahead of the codes.
fn fifths(bytes: &[u8]) -> u32 {
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

pub(crate) fn q5_0(block: &[u8], out: &mut [f32]) {
    let (scale, high) = (f16(block), fifths(&block[2..]));
    let (first, second) = out.split_at_mut(16);
    for (at, ((code, first), second)) in block[6..].iter().zip(first).zip(second).enumerate() {
        let low = i32::from(code & 15) | ((high >> at) << 4 & 16) as i32;
        let up = i32::from(code >> 4) | (high >> (at + 12) & 16) as i32;
        *first = (low - 16) as f32 * scale;
        *second = (up - 16) as f32 * scale;
    }
}

pub(crate) fn q5_1(block: &[u8], out: &mut [f32]) {
    let (scale, least, high) = (f16(block), f16(&block[2..]), fifths(&block[4..]));
    let (first, second) = out.split_at_mut(16);
    for (at, ((code, first), second)) in block[8..].iter().zip(first).zip(second).enumerate() {
        let low = u32::from(code & 15) | (high >> at) << 4 & 16;
        let up = u32::from(code >> 4) | high >> (at + 12) & 16;
        *first = low as f32 * scale + least;
        *second = up as f32 * scale + least;
    }
}

pub(crate) fn q8_0(block: &[u8], out: &mut [f32]) {
    let scale = f16(block);
    for (code, out) in block[2..].iter().zip(out) {
        *out = f32::from(*code as i8) * scale;
    }
}

/// 16 bytes of scales and minima, 64 of codes, scale and minimum of those.
pub(crate) fn q2_k(block: &[u8], out: &mut [f32]) {
    let (scales, codes) = (&block[..16], &block[16..80]);
    let (scale, least) = (f16(&block[80..]), f16(&block[82..]));
    for (part, out) in out.chunks_exact_mut(16).enumerate() {
        // 128 numbers share 32 bytes, two bits each; 32 numbers have one place in the bytes.
        let codes = &codes[part / 8 * 32 + part % 2 * 16..][..16];
        let shift = part % 8 / 2 * 2;
        let (factor, offset) = (scale * f32::from(scales[part] & 15), least * f32::from(scales[part] >> 4));
        for (code, out) in codes.iter().zip(out) {
            *out = factor * f32::from(code >> shift & 3) - offset;
        }
    }
}

/// 32 bytes of third bits, 64 of codes, 12 of scales, the scale of those.
pub(crate) fn q3_k(block: &[u8], out: &mut [f32]) {
    let (thirds, codes, packed) = (&block[..32], &block[32..96], &block[96..108]);
    let scale = f16(&block[108..]);
    for (part, out) in out.chunks_exact_mut(16).enumerate() {
        // Four lower bits of 16 scales in 8 bytes, their two upper bits in 4.
        let low = packed[part % 8] >> (part / 8 * 4) & 15;
        let up = packed[8 + part % 4] >> (part / 4 * 2) & 3;
        let factor = scale * (f32::from((low | up << 4) as i8) - 32.0);
        let from = part % 2 * 16;
        let codes = &codes[part / 8 * 32 + from..][..16];
        let (shift, bit) = (part % 8 / 2 * 2, 1 << (part / 2));
        for ((code, third), out) in codes.iter().zip(&thirds[from..]).zip(out) {
            let less = if third & bit == 0 { 4 } else { 0 };
            *out = factor * f32::from((code >> shift & 3) as i8 - less);
        }
    }
}

/// Scale and minimum of part `part` of eight, 6 bits each, out of 12 bytes.
fn scale_and_least(part: usize, packed: &[u8]) -> (u8, u8) {
    if part < 4 {
        return (packed[part] & 63, packed[part + 4] & 63);
    }
    let scale = packed[part + 4] & 15 | packed[part - 4] >> 6 << 4;
    let least = packed[part + 4] >> 4 | packed[part] >> 6 << 4;
    (scale, least)
}

/// Scale and minimum of those, 12 bytes of scales, 128 of codes.
pub(crate) fn q4_k(block: &[u8], out: &mut [f32]) {
    let (scale, least, packed) = (f16(block), f16(&block[2..]), &block[4..16]);
    for (part, out) in out.chunks_exact_mut(32).enumerate() {
        let (own_scale, own_least) = scale_and_least(part, packed);
        let (factor, offset) = (scale * f32::from(own_scale), least * f32::from(own_least));
        let codes = &block[16 + part / 2 * 32..][..32];
        for (code, out) in codes.iter().zip(out) {
            *out = factor * f32::from(code >> (part % 2 * 4) & 15) - offset;
        }
    }
}

/// As [`q4_k`], with 32 bytes of fifth bits ahead of the codes.
pub(crate) fn q5_k(block: &[u8], out: &mut [f32]) {
    let (scale, least, packed) = (f16(block), f16(&block[2..]), &block[4..16]);
    let high = &block[16..48];
    for (part, out) in out.chunks_exact_mut(32).enumerate() {
        let (own_scale, own_least) = scale_and_least(part, packed);
        let (factor, offset) = (scale * f32::from(own_scale), least * f32::from(own_least));
        let codes = &block[48 + part / 2 * 32..][..32];
        for ((code, high), out) in codes.iter().zip(high).zip(out) {
            let fifth = if high & 1 << part != 0 { 16.0 } else { 0.0 };
            *out = factor * (f32::from(code >> (part % 2 * 4) & 15) + fifth) - offset;
        }
    }
}

/// 128 bytes of lower bits, 64 of the two upper bits, 16 scales, the scale of those.
pub(crate) fn q6_k(block: &[u8], out: &mut [f32]) {
    let scale = f16(&block[208..]);
    for (half, out) in out.chunks_exact_mut(128).enumerate() {
        let (low, high) = (&block[64 * half..][..64], &block[128 + 32 * half..][..32]);
        let scales = &block[192 + 8 * half..][..8];
        for (quarter, out) in out.chunks_exact_mut(32).enumerate() {
            let low = &low[quarter % 2 * 32..][..32];
            for (at, ((low, high), out)) in low.iter().zip(high).zip(out).enumerate() {
                let code = low >> (quarter / 2 * 4) & 15 | (high >> (2 * quarter) & 3) << 4;
                let own_scale = scales[2 * quarter + at / 16] as i8;
                *out = scale * f32::from(own_scale) * f32::from(code as i8 - 32);
            }
        }
    }
}
