//! Names of tensors in adapter files.
//!
//! PEFT's files say `base_model.model.MODULE.lora_A.weight`. What PEFT holds in memory, and what some programs write, has the
//! adapter's name in it: `base_model.model.MODULE.lora_A.default.weight`. Others leave `base_model.model.` away.

/// What PEFT's names begin with.
pub const PREFIX: &str = "base_model.model.";

/// Parts of a name behind which an adapter's name may stand.
const KINDS: &[&str] = &[
    "lora_A",
    "lora_B",
    "lora_E",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "ia3_l",
    "trainable_tokens_delta",
    "modules_to_save",
];

/// A tensor's name, taken apart.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// The module, for example `model.layers.0.self_attn.q_proj`; empty for tensors that stand before the tokens.
    pub module: String,
    /// What follows, in PEFT's files: `lora_A.weight`, `lora_magnitude_vector`, `prompt_embeddings`.
    pub suffix: String,
}

impl Key {
    /// Takes a name apart, whatever its style.
    pub fn parse(name: &str) -> Self {
        let bare = name.strip_prefix(PREFIX).unwrap_or(name);
        let parts: Vec<&str> = bare.split('.').collect();
        let Some(at) = parts.iter().position(|part| KINDS.contains(part)) else {
            // A whole tensor of a module: `….lm_head.weight`, `….q_proj.base_layer.bias`, or one without a module.
            return match bare.rsplit_once('.') {
                Some((module, suffix)) => match module.strip_suffix(".base_layer") {
                    Some(module) => Self::new(module, &format!("base_layer.{suffix}")),
                    None => Self::new(module, suffix),
                },
                None => Self::new("", bare),
            };
        };
        let module = parts[..at].join(".");
        let mut rest = parts[at..].to_vec();
        let is_last = |part: &str| matches!(part, "weight" | "bias");
        if rest.len() > 1 && !is_last(rest[1]) {
            rest.remove(1);
        }
        match *rest {
            // In memory only: the wrapper's name stands in no file.
            ["modules_to_save", suffix] => Self::new(&module, suffix),
            ["lora_magnitude_vector", "weight"] => Self::new(&module, "lora_magnitude_vector"),
            _ => Self::new(&module, &rest.join(".")),
        }
    }

    fn new(module: &str, suffix: &str) -> Self {
        Self { module: module.to_owned(), suffix: suffix.to_owned() }
    }

    /// The name in PEFT's files.
    pub fn peft(&self) -> String {
        if self.module.is_empty() { self.suffix.clone() } else { format!("{PREFIX}{}", self.bare()) }
    }

    /// Without `base_model.model.`.
    pub fn bare(&self) -> String {
        if self.module.is_empty() { self.suffix.clone() } else { format!("{}.{}", self.module, self.suffix) }
    }

    /// As PEFT holds it in memory, with the adapter's name.
    pub fn named(&self, adapter: &str) -> String {
        if self.module.is_empty() {
            return self.suffix.clone();
        }
        let suffix = match self.suffix.split_once('.') {
            Some((kind, rest)) if KINDS.contains(&kind) => format!("{kind}.{adapter}.{rest}"),
            None if self.suffix == "lora_magnitude_vector" => format!("{}.{adapter}.weight", self.suffix),
            None if KINDS.contains(&self.suffix.as_str()) => format!("{}.{adapter}", self.suffix),
            None => format!("modules_to_save.{adapter}.{}", self.suffix),
            Some(_) => self.suffix.clone(),
        };
        format!("{PREFIX}{}.{suffix}", self.module)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_every_style_mean_the_same() {
        let q = "model.layers.0.self_attn.q_proj";
        for (suffix, in_memory) in [
            ("lora_A.weight", "lora_A.default.weight"),
            ("lora_B.bias", "lora_B.default.bias"),
            ("lora_magnitude_vector", "lora_magnitude_vector.default.weight"),
            ("lora_E", "lora_E.default"),
            ("ia3_l", "ia3_l.default"),
            ("lora_embedding_A", "lora_embedding_A.default"),
            ("base_layer.bias", "base_layer.bias"),
        ] {
            let key = Key { module: q.to_owned(), suffix: suffix.to_owned() };
            assert_eq!(key.peft(), format!("base_model.model.{q}.{suffix}"));
            assert_eq!(key.named("default"), format!("base_model.model.{q}.{in_memory}"));
            for name in [key.peft(), key.bare(), key.named("default"), key.named("pirate")] {
                assert_eq!(Key::parse(&name), key, "{name}");
            }
        }
        let head = Key { module: "lm_head".to_owned(), suffix: "weight".to_owned() };
        assert_eq!(head.peft(), "base_model.model.lm_head.weight");
        assert_eq!(Key::parse(&head.named("x")), head);
        let prompt = Key { module: String::new(), suffix: "prompt_embeddings".to_owned() };
        for name in [prompt.peft(), prompt.bare(), prompt.named("default")] {
            assert_eq!((name.as_str(), Key::parse(&name)), ("prompt_embeddings", prompt.clone()));
        }
    }
}
