//! Files that candle writes are read as candle reads them; files that nobody should write are refused.

#![allow(clippy::unwrap_used, reason = "a test that cannot set its scene should fail")]

use std::io::Cursor;

use candle_core::{
    Device, Tensor,
    quantized::{GgmlDType, QTensor, gguf_file},
};
use shanty_gguf::{Header, Kind, Value};

const KINDS: [(Kind, GgmlDType); 13] = [
    (Kind::F32, GgmlDType::F32),
    (Kind::F16, GgmlDType::F16),
    (Kind::BF16, GgmlDType::BF16),
    (Kind::Q4_0, GgmlDType::Q4_0),
    (Kind::Q4_1, GgmlDType::Q4_1),
    (Kind::Q5_0, GgmlDType::Q5_0),
    (Kind::Q5_1, GgmlDType::Q5_1),
    (Kind::Q8_0, GgmlDType::Q8_0),
    (Kind::Q2_K, GgmlDType::Q2K),
    (Kind::Q3_K, GgmlDType::Q3K),
    (Kind::Q4_K, GgmlDType::Q4K),
    (Kind::Q5_K, GgmlDType::Q5K),
    (Kind::Q6_K, GgmlDType::Q6K),
];

/// A file with one tensor of every kind, 6 x 512 random numbers each, and metadata of every type.
fn file() -> (Vec<u8>, Vec<(Kind, QTensor)>) {
    let tensors: Vec<(Kind, QTensor)> = KINDS
        .iter()
        .map(|(kind, dtype)| {
            let numbers = Tensor::randn(0.0_f32, 1.7, (6, 512), &Device::Cpu).unwrap();
            (*kind, QTensor::quantize(&numbers, *dtype).unwrap())
        })
        .collect();
    let named: Vec<(String, &QTensor)> =
        tensors.iter().map(|(kind, tensor)| (format!("{kind:?}"), tensor)).collect();
    let named: Vec<(&str, &QTensor)> = named.iter().map(|(name, tensor)| (name.as_str(), *tensor)).collect();
    use gguf_file::Value as V;
    let texts = V::Array(vec![V::String("a".into()), V::String(String::new()), V::String("é".into())]);
    let metadata = [
        ("general.architecture", V::String("llama".into())),
        ("small", V::I8(-3)),
        ("large", V::U64(1 << 40)),
        ("share", V::F32(0.5)),
        ("flag", V::Bool(true)),
        ("texts", texts),
        ("numbers", V::Array(vec![V::I32(-1), V::I32(7)])),
    ];
    let metadata: Vec<(&str, &V)> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let mut bytes = Cursor::new(Vec::new());
    gguf_file::write(&mut bytes, &metadata, &named).unwrap();
    (bytes.into_inner(), tensors)
}

#[test]
fn every_kind_gives_candle_s_bits() {
    let (bytes, tensors) = file();
    let header = Header::of_bytes(&bytes).unwrap();
    assert_eq!(header.tensors().count(), KINDS.len());
    for (kind, tensor) in &tensors {
        let info = header.tensor(&format!("{kind:?}")).unwrap();
        assert_eq!((info.kind, info.shape), (*kind, &[512_u64, 6][..]));
        let mut numbers = vec![f32::NAN; 6 * 512];
        kind.write_f32(&bytes[info.start as usize..][..info.bytes as usize], &mut numbers);
        let wanted: Vec<f32> =
            tensor.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let bits = |numbers: &[f32]| numbers.iter().map(|number| number.to_bits()).collect::<Vec<u32>>();
        assert!(bits(&numbers) == bits(&wanted), "{kind:?} differs from candle");
    }
}

#[test]
fn metadata_of_every_type() {
    let (bytes, _) = file();
    let header = Header::of_bytes(&bytes).unwrap();
    let get = |key| header.get(key).unwrap();
    assert_eq!(get("general.architecture").as_str(), Some("llama"));
    assert_eq!(get("small"), Value::Signed(-3));
    assert_eq!(get("large").as_u64(), Some(1 << 40));
    assert_eq!(get("share").as_f64(), Some(0.5));
    assert_eq!(get("flag").as_bool(), Some(true));
    let texts: Vec<_> = get("texts").as_list().unwrap().iter().map(|text| text.as_str().unwrap()).collect();
    assert_eq!(texts, ["a", "", "é"]);
    let numbers: Vec<_> = get("numbers").as_list().unwrap().iter().map(|n| n.as_i64().unwrap()).collect();
    assert_eq!(numbers, [-1, 7]);
    assert_eq!(header.get("nothing"), None);
    assert_eq!(header.keys().count(), 7);
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let (bytes, _) = file();
    // The last tensor may be followed by less than the padding that candle writes.
    for length in (0..bytes.len() - 32).step_by(7) {
        assert!(Header::of_bytes(&bytes[..length]).is_err(), "{length} of {} bytes", bytes.len());
    }
}

/// Little-endian pieces of a header.
#[derive(Default)]
struct Builder(Vec<u8>);

impl Builder {
    fn begin(version: u32, tensors: u64, entries: u64) -> Self {
        let mut this = Self(b"GGUF".to_vec());
        this.0.extend(version.to_le_bytes());
        this.long(tensors).long(entries);
        this
    }

    fn word(&mut self, word: u32) -> &mut Self {
        self.0.extend(word.to_le_bytes());
        self
    }

    fn long(&mut self, long: u64) -> &mut Self {
        self.0.extend(long.to_le_bytes());
        self
    }

    fn text(&mut self, text: &str) -> &mut Self {
        self.long(text.len() as u64);
        self.0.extend(text.as_bytes());
        self
    }

    fn tensor(&mut self, name: &str, shape: &[u64], kind: u32, offset: u64) -> &mut Self {
        self.text(name).word(shape.len() as u32);
        for size in shape {
            self.long(*size);
        }
        self.word(kind).long(offset)
    }

    fn end(&mut self, data: usize) -> Vec<u8> {
        let length = self.0.len().next_multiple_of(32) + data;
        self.0.resize(length, 0);
        std::mem::take(&mut self.0)
    }
}

fn problem(bytes: &[u8]) -> String {
    Header::of_bytes(bytes).expect_err("a hostile header").to_string()
}

#[test]
fn hostile_headers_are_refused_by_name() {
    let begin = |tensors, entries| Builder::begin(3, tensors, entries);
    let cases: [(&str, Vec<u8>); 23] = [
        ("does not begin with", b"GGML\x03\0\0\0".to_vec()),
        ("version 1;", Builder::begin(1, 0, 0).end(0)),
        ("big-endian", Builder::begin(3_u32.swap_bytes(), 0, 0).end(0)),
        ("18446744073709551615 tensors are claimed", begin(u64::MAX, 0).end(64)),
        ("4611686018427387904 entries of metadata are claimed", begin(0, 1 << 62).end(64)),
        ("ends inside its header", begin(0, 1).text("k").word(4).0.clone()),
        ("a key of 1099511627776 bytes is claimed", begin(0, 1).long(1 << 40).end(64)),
        ("a value of type 99", begin(0, 1).text("k").word(99).end(64)),
        ("a list of type 9", begin(0, 1).text("k").word(9).word(9).long(1).end(64)),
        ("items of a list are claimed", begin(0, 1).text("k").word(9).word(4).long(1 << 61).end(64)),
        ("a text of 72057594037927936 bytes", begin(0, 1).text("k").word(8).long(1 << 56).end(64)),
        ("there twice", begin(0, 2).text("k").word(7).0.iter().copied().chain([1]).chain(twin()).collect()),
        ("general.alignment is", begin(0, 1).text("general.alignment").word(4).word(0).end(64)),
        ("5 dimensions", begin(1, 0).tensor("t", &[1; 5], 0, 0).end(64)),
        ("without numbers", begin(1, 0).tensor("t", &[0, 1 << 40, 1 << 40], 0, 0).end(64)),
        ("stored as type 16; read are F32", begin(1, 0).tensor("t", &[32], 16, 0).end(64)),
        ("which Q4_0 cannot store", begin(1, 0).tensor("t", &[33], 2, 0).end(64)),
        ("which F32 cannot store", begin(1, 0).tensor("t", &[1 << 40, 1 << 40], 0, 0).end(64)),
        ("takes 64 bytes at 32", begin(1, 0).tensor("t", &[16], 0, 32).end(64)),
        ("no multiple of 32", begin(1, 0).tensor("t", &[2], 0, 8).end(64)),
        ("inside another", begin(2, 0).tensor("a", &[16], 0, 0).tensor("b", &[8], 0, 32).end(64)),
        ("`t` is there twice", begin(2, 0).tensor("t", &[8], 0, 0).tensor("t", &[8], 0, 32).end(64)),
        ("in a file of", begin(1, 0).tensor("t", &[1 << 20], 0, 0).end(64)),
    ];
    for (wanted, bytes) in cases {
        let found = problem(&bytes);
        assert!(found.contains(wanted), "expected `{wanted}`, got `{found}`");
    }
}

/// A second entry `k = true`.
fn twin() -> Vec<u8> {
    let mut bytes = Builder::default();
    bytes.text("k").word(7);
    bytes.0.push(1);
    bytes.0
}

#[test]
fn a_header_longer_than_the_first_read() {
    let mut builder = Builder::begin(3, 1, 1);
    builder.text("tokens").word(9).word(8).long(400_000);
    (0..400_000).for_each(|_| {
        builder.text("token");
    });
    let bytes = builder.tensor("t", &[8], 0, 0).end(32);
    let path = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(path.path(), &bytes).unwrap();
    let header = Header::read(&std::fs::File::open(path.path()).unwrap()).unwrap();
    assert_eq!(header.get("tokens").unwrap().as_list().unwrap().len(), 400_000);
    assert_eq!(header.tensor("t").unwrap().bytes, 32);
}
