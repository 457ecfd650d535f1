//! Text to ids and back, and conversations to text.

mod gguf;
mod python;
mod settings;
pub(crate) mod template;

use std::{ops::Range, path::Path, path::PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokenizers::processors::PostProcessorWrapper;

use self::{settings::Settings, template::ChatTemplate};
use crate::Error;

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, …
    pub role: String,
    /// What was said.
    pub content: String,
}

/// Tokens with the bytes of the text that they stand for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Encoded {
    /// Token ids.
    pub ids: Vec<u32>,
    /// For each id the range of bytes of the text; empty for tokens that were added before or after it.
    pub offsets: Vec<Range<usize>>,
}

/// A conversation as the model reads it, and the bytes of it that the assistant wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// The text. Encode it without special tokens: the template writes them.
    pub text: String,
    /// What the assistant wrote, its end tokens included; ascending and disjoint.
    pub answers: Vec<Range<usize>>,
}

/// Tokenizer and chat template of a model folder.
#[derive(Debug)]
pub struct Tokenizer {
    model_dir: PathBuf,
    /// Without post-processor: what that would add is in `before` and `after`, and all else that it does is to
    /// shift offsets, which would hide tokens of white space from the masks.
    inner: tokenizers::Tokenizer,
    before: Vec<u32>,
    after: Vec<u32>,
    bos: Option<u32>,
    eos: Option<u32>,
    pad: Option<u32>,
    stop_ids: Vec<u32>,
    answer_end: Option<u32>,
    specials: Vec<String>,
    template: Option<Result<ChatTemplate, String>>,
    /// Literals of the template that look like tokens and are none, with the number of ids that they become.
    broken_literals: Vec<(String, usize)>,
    hash: String,
}

impl Tokenizer {
    /// Loads `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json`, `chat_template.jinja` and the end tokens of
    /// `generation_config.json` and `config.json`; only the first must be there. Of a GGUF file, what it carries.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if a file cannot be read or understood, [`Error::SplitToken`] if the configuration names a
    /// begin or end token that is no token. A broken chat template is reported at its first use.
    pub fn load(model_dir: &Path) -> Result<Self, Error> {
        Self::load_at(model_dir, None)
    }

    /// As [`Tokenizer::load`], with the time that chat templates see as now, in seconds since the Unix epoch (UTC).
    ///
    /// Without one, `strftime_now` is undefined, and templates fall back to the date that they carry.
    pub fn load_at(model_dir: &Path, template_time: Option<i64>) -> Result<Self, Error> {
        let path = tokenizer_file(model_dir);
        let fail = |reason: String| Error::Tokenizer { path: path.clone(), place: None, reason };
        let (bytes, settings) = if model_dir.is_file() {
            gguf::load(model_dir)?
        } else {
            let bytes = std::fs::read(&path).map_err(|source| fail(source.to_string()))?;
            (bytes, Settings::load(model_dir)?)
        };
        let mut inner =
            tokenizers::Tokenizer::from_bytes(&bytes).map_err(|source| fail(source.to_string()))?;
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|source| fail(source.to_string()))?;
        let (mut before, mut after) = surroundings(&inner).map_err(&fail)?;
        inner.with_post_processor(None::<PostProcessorWrapper>);

        let mut tokenizer = Self {
            model_dir: model_dir.to_owned(),
            inner,
            before: Vec::new(),
            after: Vec::new(),
            bos: None,
            eos: None,
            pad: None,
            stop_ids: Vec::new(),
            answer_end: None,
            specials: Vec::new(),
            template: None,
            broken_literals: Vec::new(),
            hash: String::new(),
        };
        tokenizer.bos = tokenizer.named(settings.bos_token.as_deref())?;
        tokenizer.eos = tokenizer.named(settings.eos_token.as_deref())?.or(settings.eos_ids.first().copied());
        tokenizer.pad = settings.pad_token.as_deref().and_then(|token| tokenizer.inner.token_to_id(token));
        adjust(&mut before, settings.add_bos_token, tokenizer.bos, |ids, bos| ids.insert(0, bos));
        adjust(&mut after, settings.add_eos_token, tokenizer.eos, |ids, eos| ids.push(eos));
        (tokenizer.before, tokenizer.after) = (before, after);
        tokenizer.specials = tokenizer
            .inner
            .get_added_tokens_decoder()
            .into_values()
            .filter(|token| token.special)
            .map(|token| token.content)
            .collect();
        tokenizer.specials.sort_unstable();

        let template = settings.chat_template.as_deref();
        tokenizer.template =
            template.map(|source| ChatTemplate::new(source, &settings.tokens, template_time));
        tokenizer.broken_literals = tokenizer.find_broken_literals(template.unwrap_or_default())?;
        tokenizer.answer_end = tokenizer.find_answer_end();
        let ends =
            tokenizer.eos.into_iter().chain(settings.eos_ids.iter().copied()).chain(tokenizer.answer_end);
        for id in ends {
            if !tokenizer.stop_ids.contains(&id) {
                tokenizer.stop_ids.push(id);
            }
        }
        tokenizer.hash = tokenizer.hash_of(&bytes, template.unwrap_or_default(), &settings);
        Ok(tokenizer)
    }

    /// The id of a token that the configuration names.
    fn named(&self, token: Option<&str>) -> Result<Option<u32>, Error> {
        let Some(token) = token else { return Ok(None) };
        match self.inner.token_to_id(token) {
            Some(id) => Ok(Some(id)),
            None => {
                let pieces = self.encode(token, false)?.len();
                Err(Error::SplitToken { token: token.to_owned(), pieces, place: None })
            }
        }
    }

    fn find_broken_literals(&self, template: &str) -> Result<Vec<(String, usize)>, Error> {
        let mut broken = Vec::new();
        for literal in template::token_literals(template) {
            let ids = self.encode(&literal, false)?;
            // One id may also be the one for all that is unknown.
            if ids.len() != 1 || self.inner.token_to_id(&literal) != ids.first().copied() {
                broken.push((literal, ids.len()));
            }
        }
        Ok(broken)
    }

    /// The special token that ends an answer in the chat template, found by rendering one.
    fn find_answer_end(&self) -> Option<u32> {
        let template = self.template.as_ref()?.as_ref().ok()?;
        let messages = [
            serde_json::json!({"role": "user", "content": "x"}),
            serde_json::json!({"role": "assistant", "content": "y"}),
        ];
        let said = template::Said { messages: &messages, tools: None, trained: &[true, true] };
        let rendered = template.answers(&self.model_dir, said, &self.specials).ok()?;
        let answer = rendered.answers.last()?;
        let token =
            self.specials.iter().find(|token| rendered.text[..answer.end].ends_with(token.as_str()))?;
        self.inner.token_to_id(token)
    }

    fn hash_of(&self, tokenizer: &[u8], template: &str, settings: &Settings) -> String {
        let mut hasher = blake3::Hasher::new();
        let mut field = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        field(tokenizer);
        field(template.as_bytes());
        for (name, token) in &settings.tokens {
            field(name.as_bytes());
            field(token.as_bytes());
        }
        let ids = [&self.before, &self.after, &self.eos.into_iter().collect::<Vec<_>>()];
        for list in ids {
            let bytes: Vec<u8> = list.iter().flat_map(|id| id.to_le_bytes()).collect();
            field(&bytes);
        }
        hasher.finalize().to_hex().to_string()
    }

    fn fail(&self, reason: impl ToString) -> Error {
        Error::Tokenizer { path: tokenizer_file(&self.model_dir), place: None, reason: reason.to_string() }
    }

    /// Text to ids; with `add_special`, with what the tokenizer puts before and after a text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, Error> {
        let encoding = self.inner.encode_fast(text, false).map_err(|source| self.fail(source))?;
        if !add_special {
            return Ok(encoding.get_ids().to_vec());
        }
        Ok([&self.before, encoding.get_ids(), &self.after].concat())
    }

    /// As [`Tokenizer::encode`], with the bytes that each token stands for.
    pub fn encode_with_offsets(&self, text: &str, add_special: bool) -> Result<Encoded, Error> {
        let encoding = self.inner.encode(text, false).map_err(|source| self.fail(source))?;
        let mut encoded = Encoded::default();
        let (before, after) = if add_special { (&*self.before, &*self.after) } else { (&[][..], &[][..]) };
        encoded.ids = [before, encoding.get_ids(), after].concat();
        encoded.offsets.resize(before.len(), 0..0);
        encoded.offsets.extend(encoding.get_offsets().iter().map(|(start, end)| *start..*end));
        encoded.offsets.resize(encoded.ids.len(), text.len()..text.len());
        Ok(encoded)
    }

    /// Ids to text. Special tokens are left out with `skip_special`.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, Error> {
        self.inner.decode(ids, skip_special).map_err(|source| self.fail(source))
    }

    /// The text of one token as the vocabulary has it, for messages.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id of a token of the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token that begins a text, if the model has one. Whether [`Tokenizer::encode`] adds it is the tokenizer's choice.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends a text, if the model has one: what is appended and trained.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// The special token that ends an answer in the chat template, if it ends with one.
    pub fn answer_end(&self) -> Option<u32> {
        self.answer_end
    }

    /// All tokens at which generation stops: [`Tokenizer::eos`], those of `generation_config.json` and `config.json`, and
    /// [`Tokenizer::answer_end`].
    pub fn stop_ids(&self) -> &[u32] {
        &self.stop_ids
    }

    /// The padding token, if the model has one. No label depends on it.
    pub fn pad(&self) -> Option<u32> {
        self.pad
    }

    /// Whether an id is a control token (begin, end, turn, …), not text.
    pub fn is_special(&self, id: u32) -> bool {
        self.inner
            .get_added_vocabulary()
            .simple_id_to_token(id)
            .is_some_and(|token| self.specials.binary_search(&token).is_ok())
    }

    /// One more than the highest id, added tokens included. The model's embedding must have at least as many rows.
    pub fn vocabulary_size(&self) -> usize {
        let vocabulary = self.inner.get_vocab(true);
        vocabulary.values().max().map_or(0, |id| *id as usize + 1)
    }

    /// Whether there is a chat template.
    pub fn has_chat_template(&self) -> bool {
        self.template.is_some()
    }

    /// BLAKE3 over all that decides how a text becomes ids, hexadecimal.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    /// Whether there is a chat template that parses.
    ///
    /// # Errors
    /// [`Error::NoChatTemplate`]; [`Error::Template`] if it is broken.
    pub fn check_template(&self) -> Result<(), Error> {
        self.template().map(|_| ())
    }

    fn template(&self) -> Result<&ChatTemplate, Error> {
        match &self.template {
            None => Err(Error::NoChatTemplate { model_dir: self.model_dir.clone() }),
            Some(Ok(template)) => Ok(template),
            Some(Err(reason)) => Err(Error::Template {
                model_dir: self.model_dir.clone(),
                place: None,
                reason: reason.clone(),
            }),
        }
    }

    /// A conversation as the model reads it. Encode it without special tokens: the template writes them.
    ///
    /// # Errors
    /// [`Error::NoChatTemplate`]; [`Error::Template`] if the template is broken or refuses the conversation.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, Error> {
        let messages: Vec<Value> = messages
            .iter()
            .map(|message| serde_json::json!({"role": message.role, "content": message.content}))
            .collect();
        self.template()?.render(&self.model_dir, &messages, None, add_generation_prompt)
    }

    /// A conversation as the model reads it, with what the assistant wrote in it.
    ///
    /// Messages are JSON objects as data files have them; `tools` is handed to the template.
    ///
    /// # Errors
    /// As [`Tokenizer::render`]; [`Error::NotPrefixStable`] if the template has no generation marks and does not
    /// render answers one after another; [`Error::SplitToken`] if it writes a token that the tokenizer does not know.
    pub fn render_answers(&self, messages: &[Value], tools: Option<&Value>) -> Result<Rendered, Error> {
        self.render_trained(messages, tools, &vec![true; messages.len()])
    }

    /// As [`Tokenizer::render_answers`], without the answers whose message `trained` says no of.
    ///
    /// # Errors
    /// As [`Tokenizer::render_answers`]; [`Error::NotPrefixStable`] too if some answers are left out and the template's
    /// generation marks are not one pair an answer.
    pub fn render_trained(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
        trained: &[bool],
    ) -> Result<Rendered, Error> {
        let conversation = template::Said { messages, tools, trained };
        let rendered = self.template()?.answers(&self.model_dir, conversation, &self.specials)?;
        for (literal, pieces) in &self.broken_literals {
            if rendered.text.contains(literal) {
                return Err(Error::SplitToken { token: literal.clone(), pieces: *pieces, place: None });
            }
        }
        self.check_built_tokens(&rendered.text, messages)?;
        Ok(rendered)
    }

    /// Refuses control tokens that the template puts together from parts (`<|` and the role and `|>`) and that
    /// are none of the vocabulary. What a message itself holds is text, and no business of ours.
    fn check_built_tokens(&self, text: &str, messages: &[Value]) -> Result<(), Error> {
        for literal in template::built_tokens(text) {
            if self.inner.token_to_id(literal).is_some()
                || messages.iter().any(|message| holds(message, literal))
            {
                continue;
            }
            let pieces = self.encode(literal, false)?.len();
            return Err(Error::SplitToken { token: literal.to_owned(), pieces, place: None });
        }
        Ok(())
    }
}

/// Whether a text is somewhere in a JSON value.
fn holds(value: &Value, text: &str) -> bool {
    match value {
        Value::String(inner) => inner.contains(text),
        Value::Array(values) => values.iter().any(|value| holds(value, text)),
        Value::Object(map) => map.iter().any(|(key, value)| key.contains(text) || holds(value, text)),
        _ => false,
    }
}

/// Where a model's tokenizer lies: in its folder, or in its one file.
fn tokenizer_file(model: &Path) -> PathBuf {
    if model.is_file() { model.to_owned() } else { model.join("tokenizer.json") }
}

/// What the tokenizer's post-processor puts before and after a text.
fn surroundings(inner: &tokenizers::Tokenizer) -> Result<(Vec<u32>, Vec<u32>), String> {
    let mut found: Option<(Vec<u32>, Vec<u32>)> = None;
    for probe in ["a", "Two words"] {
        let plain = inner.encode_fast(probe, false).map_err(|source| source.to_string())?;
        let whole = inner.encode_fast(probe, true).map_err(|source| source.to_string())?;
        let (plain, whole) = (plain.get_ids(), whole.get_ids());
        let start = (0..=whole.len().saturating_sub(plain.len()))
            .find(|start| whole[*start..].starts_with(plain))
            .ok_or("its post-processor changes the tokens of a text, not only what surrounds them")?;
        let around = (whole[..start].to_vec(), whole[start + plain.len()..].to_vec());
        if found.as_ref().is_some_and(|found| *found != around) {
            return Err("its post-processor surrounds every text differently".to_owned());
        }
        found = Some(around);
    }
    Ok(found.unwrap_or_default())
}

/// Follows `add_bos_token` or `add_eos_token` of `tokenizer_config.json` where it says something else than the post-processor does.
fn adjust(ids: &mut Vec<u32>, wanted: Option<bool>, id: Option<u32>, add: impl Fn(&mut Vec<u32>, u32)) {
    let (Some(wanted), Some(id)) = (wanted, id) else { return };
    match (wanted, ids.contains(&id)) {
        (true, false) => add(ids, id),
        (false, true) => ids.retain(|other| *other != id),
        _ => {}
    }
}
