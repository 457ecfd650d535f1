//! Errors on the wire: a [`Diagnostic`] as a gRPC status and back, nothing lost but the caret's width.
//!
//! The gRPC code tells machines whose fault it was; the whole [`ErrorDetail`] travels in binary metadata.

use prost::Message;
use shanty_diagnostic::{Diagnose, Diagnostic, Kind};
use tonic::{Code, Status, metadata::MetadataValue};

use crate::v1::ErrorDetail;

/// Metadata key of the encoded [`ErrorDetail`].
pub const DETAIL_KEY: &str = "shanty-error-bin";

/// Code of an error whose other side gave no code: the connection, a proxy, or a foreign server failed.
pub const UNREACHABLE: &str = "SH0776";

/// gRPC limits a header block to 8 KiB by default; a longer message is cut before it becomes a header.
const LONGEST_TEXT: usize = 2048;

/// The one table: codes that mean something to a gRPC client beyond their kind.
const BY_CODE: &[(&str, Code)] = &[
    ("SH0740", Code::Unauthenticated),
    ("SH0741", Code::PermissionDenied),
    ("SH0742", Code::Unauthenticated),
    ("SH0743", Code::PermissionDenied),
    ("SH0744", Code::ResourceExhausted),
    ("SH0747", Code::NotFound),
    ("SH0770", Code::NotFound),
    ("SH0771", Code::AlreadyExists),
    ("SH0774", Code::FailedPrecondition),
    ("SH0775", Code::InvalidArgument),
    ("SH0776", Code::Unavailable),
];

fn code_of(code: &str, kind: Kind) -> Code {
    if let Some((_, code)) = BY_CODE.iter().find(|(known, _)| *known == code) {
        return *code;
    }
    match kind {
        Kind::User => Code::InvalidArgument,
        Kind::Transient => Code::Unavailable,
        Kind::Internal => Code::Internal,
    }
}

fn kind_of(code: Code) -> Kind {
    match code {
        Code::Unavailable
        | Code::DeadlineExceeded
        | Code::Aborted
        | Code::Cancelled
        | Code::ResourceExhausted
        | Code::Unknown => Kind::Transient,
        Code::Internal | Code::DataLoss | Code::Unimplemented => Kind::Internal,
        _ => Kind::User,
    }
}

/// The detail of an error, as it travels. `retryable` says whether it is [`Kind::Transient`].
pub fn to_detail(diagnostic: &Diagnostic) -> ErrorDetail {
    let place = |place: Option<usize>| place.map_or(0, |place| u32::try_from(place).unwrap_or(u32::MAX));
    ErrorDetail {
        code: diagnostic.code.clone(),
        message: cut(&diagnostic.message),
        file: diagnostic.file.as_ref().map(|file| file.display().to_string()).unwrap_or_default(),
        line: place(diagnostic.line),
        column: place(diagnostic.column),
        hint: cut(diagnostic.hint.as_deref().unwrap_or_default()),
        retryable: diagnostic.kind.is_retryable(),
    }
}

/// The error that a detail describes. Of errors that no repeat helps, those of the steps and beyond
/// ([`Kind::Internal`]) cannot be told from wrong input without the status: `otherwise` is taken for them.
pub fn from_detail(detail: &ErrorDetail, otherwise: Kind) -> Diagnostic {
    let place = |place: u32| (place > 0).then_some(place as usize);
    let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    Diagnostic {
        code: detail.code.clone(),
        message: detail.message.clone(),
        file: text(&detail.file).map(Into::into),
        line: place(detail.line),
        column: place(detail.column),
        width: None,
        hint: text(&detail.hint),
        kind: if detail.retryable { Kind::Transient } else { otherwise },
    }
}

/// An error as a gRPC status, with the whole detail in its metadata.
pub fn to_status(error: &impl Diagnose) -> Status {
    let diagnostic = error.diagnostic();
    let detail = to_detail(&diagnostic);
    // The plain message is for foreign clients; its percent-encoding may triple it.
    let short: String = detail.message.chars().take(200).collect();
    let mut status = Status::new(code_of(&diagnostic.code, diagnostic.kind), short);
    status.metadata_mut().insert_bin(DETAIL_KEY, MetadataValue::from_bytes(&detail.encode_to_vec()));
    status
}

/// The error that a gRPC status tells of. One without a detail becomes [`UNREACHABLE`].
pub fn from_status(status: &Status) -> Diagnostic {
    let detail = status
        .metadata()
        .get_bin(DETAIL_KEY)
        .and_then(|value| value.to_bytes().ok())
        .and_then(|bytes| ErrorDetail::decode(bytes).ok());
    match detail {
        Some(detail) => from_detail(&detail, non_retryable(status.code())),
        None => Diagnostic::new(UNREACHABLE, describe(status))
            .kind(kind_of(status.code()))
            .hint("check that a coordinator runs at that address, and see its log"),
    }
}

fn non_retryable(code: Code) -> Kind {
    match kind_of(code) {
        Kind::Internal => Kind::Internal,
        Kind::User | Kind::Transient => Kind::User,
    }
}

/// What a foreign status says, with the causes that tonic keeps beneath it.
fn describe(status: &Status) -> String {
    let mut text = format!("the coordinator did not answer: {}", status.message());
    let mut source = std::error::Error::source(status);
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

fn cut(text: &str) -> String {
    if text.len() <= LONGEST_TEXT {
        return text.to_owned();
    }
    let end = (0..=LONGEST_TEXT).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    format!("{} … ({} bytes in all)", &text[..end], text.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full(kind: Kind) -> Diagnostic {
        Diagnostic::new("SH0102", "`r` is 0: no update has rank 0")
            .in_file("examples/shäkespeare/job.toml")
            .at_line(12)
            .at_column(5, 1)
            .hint("try `r = 16`")
            .kind(kind)
    }

    #[test]
    fn every_kind_keeps_all_it_says() {
        for kind in [Kind::User, Kind::Transient, Kind::Internal] {
            let sent = full(kind);
            let received = from_status(&to_status(&sent));
            // The caret's width stays behind: it is of use only beside the file's text.
            assert_eq!(received, Diagnostic { width: None, ..sent });
        }
    }

    #[test]
    fn special_codes_say_more_than_their_kind() {
        for (code, expected) in BY_CODE {
            for kind in [Kind::User, Kind::Transient] {
                let status = to_status(&Diagnostic::new(code, "x").kind(kind));
                assert_eq!(status.code(), *expected);
                assert_eq!(from_status(&status).kind, kind, "{code}");
            }
        }
    }

    #[test]
    fn foreign_statuses_are_told_apart_from_ours() {
        let error = from_status(&Status::unavailable("tcp connect error"));
        assert_eq!(error.code, UNREACHABLE);
        assert!(error.kind.is_retryable());
        assert!(error.message.contains("tcp connect error"));
        assert_eq!(from_status(&Status::unimplemented("unknown method")).kind, Kind::Internal);
    }

    #[test]
    fn a_long_message_stays_below_the_limit_of_headers() {
        let error = Diagnostic::new("SH0201", "ä".repeat(100_000));
        let received = from_status(&to_status(&error));
        assert!(received.message.len() < 3000);
        assert!(received.message.ends_with("(200000 bytes in all)"));
    }
}
