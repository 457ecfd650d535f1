//! Tokens as text, as they come: a token may be a part of a letter, which is shown once it is whole.

use shanty_data::Tokenizer;

use crate::failure::CommandResult;

/// What a decoder puts in place of bytes that are no letter (yet).
const HALF: char = '\u{fffd}';

/// Turns the tokens of one text into pieces of it.
pub(crate) struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    ids: Vec<u32>,
    /// Tokens before it are shown and needed no more; those up to `shown` are decoded again as what stands before.
    start: usize,
    shown: usize,
    text: String,
}

impl<'a> TextStream<'a> {
    pub(crate) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, ids: Vec::new(), start: 0, shown: 0, text: String::new() }
    }

    /// What may be shown now that this token has come.
    pub(crate) fn push(&mut self, id: u32) -> CommandResult<String> {
        self.ids.push(id);
        self.advance(false)
    }

    /// What is left at the end: half letters are shown as such.
    pub(crate) fn finish(mut self) -> CommandResult<(String, Finished)> {
        let rest = self.advance(true)?;
        Ok((rest, Finished { text: self.text, tokens: self.ids.len() }))
    }

    fn advance(&mut self, last: bool) -> CommandResult<String> {
        // Decoded beside a few tokens of before: whether a token begins with a space may hang on whether it stands first.
        let before = self.tokenizer.decode(&self.ids[self.start..self.shown], true)?;
        let now = self.tokenizer.decode(&self.ids[self.start..], true)?;
        if now.ends_with(HALF) && !last {
            return Ok(String::new());
        }
        let piece = now.strip_prefix(before.as_str()).unwrap_or_default().to_owned();
        if !piece.is_empty() {
            (self.start, self.shown) = (self.shown, self.ids.len());
            self.text.push_str(&piece);
        }
        Ok(piece)
    }
}

/// A text that has come to its end.
pub(crate) struct Finished {
    pub(crate) text: String,
    pub(crate) tokens: usize,
}

#[cfg(test)]
mod tests {
    use shanty_testkit::fixtures;

    use super::*;

    #[test]
    fn pieces_are_whole_letters_and_add_up_to_the_text() {
        let tokenizer = Tokenizer::load(&fixtures::reference("tokenizer")).unwrap();
        let text = "Ahoy 🏴‍☠️, señor! Ça va? 漢字 end";
        let ids = tokenizer.encode(text, false).unwrap();
        assert!(ids.len() > text.chars().count(), "letters of several tokens");
        let mut stream = TextStream::new(&tokenizer);
        let mut pieces = Vec::new();
        for id in ids {
            pieces.push(stream.push(id).unwrap());
        }
        let (rest, finished) = stream.finish().unwrap();
        assert!(pieces.iter().all(|piece| !piece.contains(HALF)), "{pieces:?}");
        assert_eq!((pieces.concat() + &rest, finished.text.as_str()), (text.to_owned(), text));
        assert!(pieces.iter().filter(|piece| !piece.is_empty()).count() > 10, "it comes in pieces: {pieces:?}");
    }

    #[test]
    fn a_text_that_ends_inside_a_letter_says_so() {
        let tokenizer = Tokenizer::load(&fixtures::reference("tokenizer")).unwrap();
        let ids = tokenizer.encode("ab 漢", false).unwrap();
        let mut stream = TextStream::new(&tokenizer);
        let shown: String = ids[..ids.len() - 1].iter().map(|id| stream.push(*id).unwrap()).collect();
        assert!(!shown.contains(HALF) && shown.starts_with("ab"), "{shown:?}");
        assert!(stream.finish().unwrap().0.ends_with(HALF));
    }
}
