//! The signed head of the log: a C2SP checkpoint (c2sp.org/tlog-checkpoint), which is a signed note (c2sp.org/signed-note).
//!
//! ```text
//! ORIGIN
//! SIZE
//! BASE64(root)
//!
//! — ORIGIN BASE64(key id ‖ Ed25519 signature of everything above the empty line)
//! ```

use std::fmt;
use std::str::FromStr;

use data_encoding::{BASE64, HEXLOWER};
use ed25519_dalek::{Signature, Signer as _, SigningKey, VerifyingKey};
use sha2::{Digest as _, Sha256};
use theriac_protocol::units::Digest;

/// Why a key, note or head is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The origin is empty, too long, or holds a space, a `+` or a control character.
    #[error("`{0}` is no log name: use 1 to 128 visible characters without spaces and +")]
    Origin(String),
    /// The public key does not parse.
    #[error("this is no public key of a log: {0}; it looks like NAME+01234567+BASE64")]
    PublicKey(&'static str),
    /// The note does not parse.
    #[error("this is no checkpoint: {0}")]
    Note(&'static str),
    /// The note is another log's.
    #[error("the checkpoint is of log `{found}`, expected `{expected}`")]
    OtherLog {
        /// Name in the key.
        expected: String,
        /// Name in the note.
        found: String,
    },
    /// No signature by the key is on it, or it is wrong.
    #[error("the checkpoint is not signed by `{0}`: it was changed, or made with another key")]
    Signature(String),
}

/// The log's private key.
pub struct LogKey {
    origin: String,
    key: SigningKey,
}

impl LogKey {
    /// The key of the log named `origin` (such as `theriac/FEDERATION`) from 32 secret random bytes.
    ///
    /// # Errors
    /// [`CheckpointError::Origin`].
    pub fn from_seed(origin: &str, seed: &[u8; 32]) -> Result<Self, CheckpointError> {
        check_origin(origin)?;
        Ok(Self {
            origin: origin.to_owned(),
            key: SigningKey::from_bytes(seed),
        })
    }

    /// The public half.
    pub fn public(&self) -> LogPublicKey {
        LogPublicKey {
            origin: self.origin.clone(),
            key: self.key.verifying_key(),
        }
    }

    /// Signs the head of the log.
    pub fn sign_head(&self, size: u64, root: Digest) -> SignedHead {
        let body = format!("{}\n{size}\n{}\n", self.origin, BASE64.encode(&root.0));
        let signature = self.sign(body.as_bytes());
        let line = [self.public().id().as_slice(), &signature].concat();
        let note = format!("{body}\n\u{2014} {} {}\n", self.origin, BASE64.encode(&line));
        SignedHead { size, root, note }
    }

    /// The signature of any bytes; the caller separates domains.
    pub(crate) fn sign(&self, bytes: &[u8]) -> [u8; 64] {
        self.key.sign(bytes).to_bytes()
    }
}

impl fmt::Debug for LogKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogKey")
            .field("origin", &self.origin)
            .finish_non_exhaustive()
    }
}

/// The log's public key. As text: `ORIGIN+KEYID+BASE64`, the form that signed notes use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogPublicKey {
    origin: String,
    key: VerifyingKey,
}

impl LogPublicKey {
    /// Name of the log.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// First four bytes of SHA-256 of the name, a newline, the algorithm (1) and the key.
    fn id(&self) -> [u8; 4] {
        let hash = Sha256::new()
            .chain_update(&self.origin)
            .chain_update(b"\n")
            .chain_update([ED25519])
            .chain_update(self.key.as_bytes())
            .finalize();
        [hash[0], hash[1], hash[2], hash[3]]
    }

    /// Whether `signature` is this key's over `bytes`. Strict: one message has one valid signature.
    pub(crate) fn verifies(&self, bytes: &[u8], signature: &[u8]) -> bool {
        Signature::from_slice(signature)
            .is_ok_and(|signature| self.key.verify_strict(bytes, &signature).is_ok())
    }
}

impl fmt::Display for LogPublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = [&[ED25519], self.key.as_bytes().as_slice()].concat();
        write!(
            f,
            "{}+{}+{}",
            self.origin,
            HEXLOWER.encode(&self.id()),
            BASE64.encode(&key)
        )
    }
}

impl FromStr for LogPublicKey {
    type Err = CheckpointError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = CheckpointError::PublicKey;
        let mut parts = text.trim().splitn(3, '+');
        let (Some(origin), Some(id), Some(key)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(wrong("it has not three parts"));
        };
        check_origin(origin)?;
        let key = BASE64
            .decode(key.as_bytes())
            .map_err(|_| wrong("its key is no base64"))?;
        let key: [u8; 32] = match key.split_first() {
            Some((&ED25519, key)) => key.try_into().map_err(|_| wrong("an Ed25519 key has 32 bytes"))?,
            _ => return Err(wrong("only Ed25519 keys (type 1) are known")),
        };
        let key = VerifyingKey::from_bytes(&key).map_err(|_| wrong("the key is no point of the curve"))?;
        let key = Self {
            origin: origin.to_owned(),
            key,
        };
        if HEXLOWER.encode(&key.id()) == id {
            Ok(key)
        } else {
            Err(wrong("its key id does not fit the key"))
        }
    }
}

/// A head that the log's key has signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedHead {
    size: u64,
    root: Digest,
    note: String,
}

impl SignedHead {
    /// Checks a note's signature and reads it. Signatures by others (witnesses) and extension lines are ignored.
    ///
    /// # Errors
    /// [`CheckpointError`].
    pub fn parse(note: &str, key: &LogPublicKey) -> Result<Self, CheckpointError> {
        let wrong = CheckpointError::Note;
        if note.len() > NOTE_BYTES_MAX {
            return Err(wrong("it is longer than 64 KiB"));
        }
        let (body, signatures) = note.rsplit_once("\n\n").ok_or(wrong("it has no signatures"))?;
        // The signed text ends with the newline before the empty line.
        let signed = &note[..=body.len()];
        let mut lines = body.split('\n');
        let (Some(origin), Some(size), Some(root)) = (lines.next(), lines.next(), lines.next()) else {
            return Err(wrong("it has not three lines"));
        };
        if origin != key.origin {
            return Err(CheckpointError::OtherLog {
                expected: key.origin.clone(),
                found: origin.to_owned(),
            });
        }
        let parsed: u64 = size.parse().map_err(|_| wrong("its size is no number"))?;
        if parsed.to_string() != size {
            return Err(wrong("its size is no plain number"));
        }
        let root = BASE64
            .decode(root.as_bytes())
            .ok()
            .and_then(|root| root.try_into().ok());
        let root = Digest(root.ok_or(wrong("its root is no base64 of 32 bytes"))?);
        if !signatures.ends_with('\n') {
            return Err(wrong("its last line does not end"));
        }
        if !signatures.lines().any(|line| is_signed(line, signed, key)) {
            return Err(CheckpointError::Signature(key.origin.clone()));
        }
        Ok(Self {
            size: parsed,
            root,
            note: note.to_owned(),
        })
    }

    /// Number of leaves.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The tree's root.
    pub fn root(&self) -> Digest {
        self.root
    }

    /// The note as text.
    pub fn note(&self) -> &str {
        &self.note
    }
}

/// Whether a signature line is the key's and right.
fn is_signed(line: &str, signed: &str, key: &LogPublicKey) -> bool {
    let Some(rest) = line.strip_prefix("\u{2014} ") else {
        return false;
    };
    let Some((name, value)) = rest.split_once(' ') else {
        return false;
    };
    let Ok(value) = BASE64.decode(value.as_bytes()) else {
        return false;
    };
    let Some((id, signature)) = value.split_first_chunk::<4>() else {
        return false;
    };
    name == key.origin && *id == key.id() && key.verifies(signed.as_bytes(), signature)
}

fn check_origin(origin: &str) -> Result<(), CheckpointError> {
    let visible = |c: char| !c.is_whitespace() && !c.is_control() && c != '+';
    if (1..=ORIGIN_BYTES_MAX).contains(&origin.len()) && origin.chars().all(visible) {
        Ok(())
    } else {
        Err(CheckpointError::Origin(
            origin.chars().take(ORIGIN_BYTES_MAX).collect(),
        ))
    }
}

/// Type of an Ed25519 key in a signed note.
const ED25519: u8 = 1;
const ORIGIN_BYTES_MAX: usize = 128;
const NOTE_BYTES_MAX: usize = 64 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> LogKey {
        LogKey::from_seed("theriac/test", &[7; 32]).unwrap()
    }

    /// The example of the Go package golang.org/x/mod/sumdb/note.
    #[test]
    fn agrees_with_the_published_note() {
        let vkey = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW";
        let public: LogPublicKey = vkey.parse().unwrap();
        assert_eq!(public.to_string(), vkey);
        let text = "If you think cryptography is the answer to your problem,\n\
                    then you don't know what your problem is.\n";
        let line = "\u{2014} PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngot\
                    pRZb6KE6RyyBwJnAM=";
        assert!(is_signed(line, text, &public));
        assert!(!is_signed(line, &text.replace("is the", "as the"), &public));
        let seed = BASE64
            .decode(b"AYEKFALVFGyNhPJEMzD1QIDr+Y7hfZx09iUvxdXHKDFz")
            .unwrap();
        let private = LogKey::from_seed("PeterNeumann", seed[1..].try_into().unwrap()).unwrap();
        assert_eq!(private.public(), public);
        let ours = [public.id().as_slice(), &private.sign(text.as_bytes())].concat();
        assert_eq!(format!("\u{2014} PeterNeumann {}", BASE64.encode(&ours)), line);
    }

    #[test]
    fn a_head_survives_its_note() {
        let head = key().sign_head(42, Digest([3; 32]));
        let expected = format!(
            "theriac/test\n42\n{}\n\n\u{2014} theriac/test ",
            BASE64.encode(&[3; 32])
        );
        assert!(head.note().starts_with(&expected), "{}", head.note());
        assert_eq!(SignedHead::parse(head.note(), &key().public()).unwrap(), head);
        let witnessed = format!("{}\u{2014} witness.example AAAAAAAA\n", head.note());
        let parsed = SignedHead::parse(&witnessed, &key().public()).unwrap();
        assert_eq!((parsed.size(), parsed.root()), (42, Digest([3; 32])));
    }

    #[test]
    fn every_changed_byte_of_a_note_is_refused() {
        let note = key().sign_head(1234, Digest([9; 32])).note().to_owned();
        for at in 0..note.len() {
            for flip in [1_u8, 0x10] {
                let mut bytes = note.clone().into_bytes();
                bytes[at] ^= flip;
                let Ok(changed) = String::from_utf8(bytes) else {
                    continue;
                };
                let parsed = SignedHead::parse(&changed, &key().public());
                assert!(parsed.is_err(), "byte {at} was changed unseen:\n{changed}");
            }
            if let Some(cut) = note.get(..at) {
                assert!(
                    SignedHead::parse(cut, &key().public()).is_err(),
                    "a note cut at {at} was taken"
                );
            }
        }
    }

    #[test]
    fn other_keys_other_names_and_odd_keys_are_refused() {
        let head = key().sign_head(1, Digest([1; 32]));
        let other_key = LogKey::from_seed("theriac/test", &[8; 32]).unwrap().public();
        assert!(matches!(
            SignedHead::parse(head.note(), &other_key),
            Err(CheckpointError::Signature(_))
        ));
        let other_name = LogKey::from_seed("theriac/prod", &[7; 32]).unwrap().public();
        assert!(matches!(
            SignedHead::parse(head.note(), &other_name),
            Err(CheckpointError::OtherLog { .. })
        ));
        for bad in ["", "a b", "a+b", "a\nb", &"a".repeat(129)] {
            assert!(LogKey::from_seed(bad, &[0; 32]).is_err(), "{bad:?} was taken");
        }
        let good = key().public().to_string();
        assert_eq!(good.parse(), Ok(key().public()));
        for bad in [
            "",
            "x",
            "a+b+c",
            &good[..good.len() - 4],
            &good.replacen('+', "x+", 1),
        ] {
            assert!(bad.parse::<LogPublicKey>().is_err(), "{bad:?} was taken");
        }
        assert!(!format!("{:?}", key()).contains("7, 7"));
    }
}
