//! What to do about an error.

use super::{Error, Origin};

impl Error {
    pub(super) fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Use(error) => return error.hint(),
            Self::Step(error) => return error.hint(),
            Self::Device(error) => return Some(error.hint()),
            Self::Read { origin: Origin::Base, .. } => {
                "a base is a folder in Hugging Face layout: config.json and model.safetensors, \
                 or model.safetensors.index.json with its shards"
                    .to_owned()
            }
            Self::Read { origin: Origin::Adapter, .. } => {
                "an adapter is a folder as PEFT saves it: adapter_config.json and adapter_model.safetensors".to_owned()
            }
            Self::ShardNeedsNf4 { .. } => {
                "set base.quantization = \"nf4\", or base.shard = \"replicate\"".to_owned()
            }
            Self::ShardOnCard => {
                "set base.shard = \"replicate\", or cluster.device = \"cpu\"".to_owned()
            }
            Self::ShardOfGguf { .. } => {
                "take the same model as safetensors, or set base.shard = \"replicate\"".to_owned()
            }
            Self::GgufArchitecture { known, .. } => format!("there are: {}", known.join(", ")),
            Self::GgufSetting { .. } => {
                "take the same model as safetensors, or a GGUF file made by llama.cpp's converter".to_owned()
            }
            Self::DamagedTensors { .. } | Self::DamagedGguf { .. } => {
                "download or copy the file again; compare its size and checksum with the source".to_owned()
            }
            Self::MissingTensor { tensor, .. } if tensor == "lm_head.weight" => {
                "if the output head shares the embedding, config.json must say \"tie_word_embeddings\": true".to_owned()
            }
            Self::MissingTensor { .. } => {
                "config.json and the weights are of different models, or the download is incomplete".to_owned()
            }
            Self::WrongShape { origin: Origin::Base, .. } => {
                "config.json and the weights are of different models".to_owned()
            }
            Self::WrongShape { origin: Origin::Adapter, .. } => {
                "the adapter was trained on another base, or with another r".to_owned()
            }
            Self::WrongDtype { origin: Origin::Base, .. } => {
                "weights are read as F32, F16, BF16, or as bitsandbytes NF4 with its quant_state beside them".to_owned()
            }
            Self::OnlyPickles { origin: Origin::Adapter, .. } => {
                "a pickle runs code when it is opened; load it with PEFT where you trust it, and save it again".to_owned()
            }
            Self::OnlyPickles { .. } => {
                "a pickle runs code when it is opened; take the safetensors of the same model, or convert it with \
                 transformers: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(DIR)"
                    .to_owned()
            }
            Self::Index { .. } => "download the model's files again, all of them from one revision".to_owned(),
            Self::NonFinite { .. } => "training from such weights gives nothing: get a sound copy".to_owned(),
            Self::NoTarget { available, nearest, .. } => {
                let there_is = format!("the model has: {}", available.join(", "));
                match nearest {
                    Some(nearest) => format!("did you mean `{nearest}`? {there_is}"),
                    None => there_is,
                }
            }
            Self::WrongTarget { .. } => {
                "name linear layers of the decoder, or use \"all-linear\"; a regular expression must match whole names"
                    .to_owned()
            }
            Self::NothingLeft { .. } => {
                "loosen exclude_modules or layers_to_transform, or take the module out of modules_to_save".to_owned()
            }
            Self::NoModuleToSave { available, .. } => format!("the model has: {}", available.join(", ")),
            Self::StartMissing { .. } => {
                "`shanty run` and the workers prepare it in the run's folder; `Engine::prepare_start` does from code".to_owned()
            }
            Self::StartOfAnother { .. } => {
                "remove that folder to have it computed again, or give the job the settings that it had".to_owned()
            }
            Self::StartNeedsWeights { .. } => {
                "take the model's 16-bit weights as the base and let Shanty quantise them, or take another start".to_owned()
            }
            Self::TargetPattern { .. } => {
                "a string is a regular expression over whole names, for example \
                 \".*\\\\.self_attn\\\\.[qv]_proj\"; for suffixes use a list: [\"q_proj\", \"v_proj\"]"
                    .to_owned()
            }
            Self::MissingAdapterTensors { .. } => {
                "PEFT would run these with random values; save the adapter again or correct target_modules".to_owned()
            }
            Self::UnexpectedAdapterTensors { .. } => {
                "PEFT would drop these; the adapter belongs to another base, or its configuration is not its own"
                    .to_owned()
            }
            Self::AdapterPrefix { .. } => {
                "PEFT would ignore all of them and run the bare base; rename NAME to base_model.model.NAME".to_owned()
            }
            _ => return None,
        };
        Some(hint)
    }
}
