//! Who stands behind a policy: an Ed25519 signature over the very bytes of `privacy.toml`, in a file beside it.
//!
//! ```text
//! privacy.toml       what is allowed, for people and programs
//! privacy.toml.sig   theriac privacy policy signature v1
//!                    key thpk1_<64 hexadecimal digits>
//!                    signature <128 hexadecimal digits>
//! signed bytes       "theriac privacy policy v1\n" ‖ 0 ‖ the file
//! ```
//!
//! One changed byte, a comment too, ends the signature: what was read is what was signed. The public key is not taken from the signature's
//! file but pinned where the officer's counterpart put it (`edge.toml`), so a policy with a signature of somebody else is no policy.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use data_encoding::HEXLOWER;
use ed25519_dalek::{Signature, Signer as _, SigningKey, VerifyingKey};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use theriac_protocol::units::Digest;

use super::{Policy, PolicyError};

/// The private key of whoever answers for privacy. It never needs to be on an edge.
#[derive(Clone)]
pub struct PolicyKey(SigningKey);

/// Its public half, written `thpk1_` and 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PolicyPublicKey([u8; 32]);

/// What a policy is about. A signature over a policy of one kind is none over another, whatever its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    /// `privacy.toml`: what leaves a node.
    Privacy,
    /// `healing.toml`: what may be done to services.
    Healing,
    /// The digest of a privacy report.
    Report,
    /// One planned action on a service: an approval.
    Approval,
    /// What stands against a service: that it is lifted.
    Reinstatement,
}

/// A signature over a policy's text, with the key that made it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PolicySignature {
    /// Who signed.
    pub key: PolicyPublicKey,
    /// What kind of policy.
    pub subject: Subject,
    signature: Signature,
}

/// Why a key or signature is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SignatureError {
    /// It is no public key.
    #[error(
        "this is no policy key: write `thpk1_` and 64 hexadecimal digits, as `theriac-edge privacy keygen` printed them"
    )]
    PublicKey,
    /// Its digits are no key that anybody can have.
    #[error(
        "these 64 digits are no public key: {0}; a digit was mistyped, or it is no key of `theriac-edge privacy keygen`"
    )]
    NoSuchKey(&'static str),
    /// It is no private key.
    #[error("this is no private policy key: one line, `thps1_` and 64 hexadecimal digits")]
    PrivateKey,
    /// It is no signature file.
    #[error("this is no signature of a policy: it was cut or edited")]
    Format,
    /// Another key signed.
    #[error("it is signed with {found}, but {expected} is pinned")]
    OtherKey {
        /// The pinned key.
        expected: PolicyPublicKey,
        /// The key of the signature.
        found: PolicyPublicKey,
    },
    /// The text is not the one that was signed.
    #[error("it was altered after it was signed with {0}")]
    Altered(PolicyPublicKey),
}

impl PolicyKey {
    /// The key made of 32 secret random bytes.
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        Self(SigningKey::from_bytes(seed))
    }

    /// Reads what [`PolicyKey::to_text`] wrote.
    ///
    /// # Errors
    /// [`SignatureError::PrivateKey`].
    pub fn from_text(text: &str) -> Result<Self, SignatureError> {
        let seed = text.trim().strip_prefix(PRIVATE).and_then(bytes);
        Ok(Self::from_seed(&seed.ok_or(SignatureError::PrivateKey)?))
    }

    /// The secret, as one line for a file of mode 0600.
    pub fn to_text(&self) -> String {
        format!("{PRIVATE}{}\n", HEXLOWER.encode(self.0.as_bytes()))
    }

    /// The public half.
    pub fn public(&self) -> PolicyPublicKey {
        PolicyPublicKey(self.0.verifying_key().to_bytes())
    }

    /// Signs a policy that holds.
    ///
    /// # Errors
    /// [`PolicyError`] when the text is no policy: what cannot be used is not signed.
    pub fn sign(&self, text: &str) -> Result<PolicySignature, PolicyError> {
        Policy::parse(text)?;
        Ok(self.sign_text(Subject::Privacy, text))
    }

    /// Signs a text of any kind of policy; the caller has read it and found that it holds.
    pub fn sign_text(&self, subject: Subject, text: &str) -> PolicySignature {
        PolicySignature {
            key: self.public(),
            subject,
            signature: self.0.sign(&subject.signed_bytes(text)),
        }
    }
}

impl PolicyKey {
    /// Signs a report by its digest: who made it, beyond what its records prove.
    pub(crate) fn sign_report(&self, digest: &Digest) -> PolicySignature {
        self.sign_text(Subject::Report, &HEXLOWER.encode(&digest.0))
    }
}

impl PolicySignature {
    /// Key and signature on one line.
    pub(crate) fn to_line(self) -> String {
        format!("{} {}", self.key, HEXLOWER.encode(&self.signature.to_bytes()))
    }

    /// Reads what [`PolicySignature::to_line`] wrote.
    pub(crate) fn from_line(text: &str) -> Result<Self, SignatureError> {
        let (key, signature) = text.split_once(' ').ok_or(SignatureError::Format)?;
        let signature = Signature::from_bytes(&bytes::<64>(signature).ok_or(SignatureError::Format)?);
        Ok(Self {
            key: key.parse()?,
            subject: Subject::Report,
            signature,
        })
    }

    /// Whether the key that it names signed a report of this digest.
    pub(crate) fn verify_report(&self, digest: &Digest) -> Result<(), SignatureError> {
        let key = VerifyingKey::from_bytes(&self.key.0).map_err(|_| SignatureError::PublicKey)?;
        let signed = Subject::Report.signed_bytes(&HEXLOWER.encode(&digest.0));
        key.verify_strict(&signed, &self.signature)
            .map_err(|_| SignatureError::Altered(self.key))
    }

    /// Whether the pinned key signed exactly this text.
    ///
    /// # Errors
    /// [`SignatureError::OtherKey`] and [`SignatureError::Altered`].
    pub fn verify(&self, text: &str, pinned: PolicyPublicKey) -> Result<(), SignatureError> {
        self.verify_text(Subject::Privacy, text, pinned)
    }

    /// Whether the pinned key signed exactly this text as a policy of this kind.
    ///
    /// # Errors
    /// [`SignatureError::Format`] for another kind, [`SignatureError::OtherKey`] and [`SignatureError::Altered`].
    pub fn verify_text(
        &self,
        subject: Subject,
        text: &str,
        pinned: PolicyPublicKey,
    ) -> Result<(), SignatureError> {
        if self.subject != subject {
            return Err(SignatureError::Format);
        }
        if self.key != pinned {
            return Err(SignatureError::OtherKey {
                expected: pinned,
                found: self.key,
            });
        }
        let key = VerifyingKey::from_bytes(&self.key.0).map_err(|_| SignatureError::PublicKey)?;
        key.verify_strict(&subject.signed_bytes(text), &self.signature)
            .map_err(|_| SignatureError::Altered(self.key))
    }
}

impl Policy {
    /// Reads a policy that the pinned key has signed; the signature lies beside it (see [`signature_path`]).
    ///
    /// # Errors
    /// [`PolicyError`], naming the file and what to do.
    pub fn load_signed(path: &Path, pinned: PolicyPublicKey) -> Result<Self, PolicyError> {
        let read = |path: &Path| {
            std::fs::read_to_string(path).map_err(|source| PolicyError::Read {
                path: path.to_owned(),
                source,
            })
        };
        let text = read(path)?;
        let beside = signature_path(path);
        let signature = match read(&beside) {
            Err(PolicyError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Err(PolicyError::Unsigned {
                    path: path.to_owned(),
                });
            }
            read => read?,
        };
        let refused = |source| PolicyError::Signature {
            path: path.to_owned(),
            source,
        };
        let signature: PolicySignature = signature.parse().map_err(refused)?;
        signature.verify(&text, pinned).map_err(refused)?;
        Ok(Self {
            signature: Some(signature),
            ..Self::parse(&text)?
        })
    }
}

/// Where the signature of the policy at `path` lies.
pub fn signature_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".sig");
    name.into()
}

impl fmt::Display for PolicySignature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let signature = HEXLOWER.encode(&self.signature.to_bytes());
        let title = self.subject.title();
        write!(f, "{title}\nkey {}\nsignature {signature}\n", self.key)
    }
}

impl FromStr for PolicySignature {
    type Err = SignatureError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let lines: Vec<&str> = text.lines().collect();
        let [title, key, signature] = lines[..] else {
            return Err(SignatureError::Format);
        };
        let subject = [
            Subject::Privacy,
            Subject::Healing,
            Subject::Approval,
            Subject::Reinstatement,
        ]
        .into_iter()
        .find(|subject| subject.title() == title)
        .ok_or(SignatureError::Format)?;
        let key = key.strip_prefix("key ").ok_or(SignatureError::Format)?.parse()?;
        let signature = signature.strip_prefix("signature ").and_then(bytes::<64>);
        let signature = Signature::from_bytes(&signature.ok_or(SignatureError::Format)?);
        Ok(Self {
            key,
            subject,
            signature,
        })
    }
}

impl fmt::Display for PolicyPublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PUBLIC}{}", HEXLOWER.encode(&self.0))
    }
}

impl fmt::Debug for PolicyPublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for PolicyPublicKey {
    type Err = SignatureError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bytes = text.strip_prefix(PUBLIC).and_then(bytes);
        let bytes = bytes.ok_or(SignatureError::PublicKey)?;
        let off = SignatureError::NoSuchKey("no point of the curve has them");
        let key = VerifyingKey::from_bytes(&bytes).map_err(|_| off)?;
        if key.is_weak() {
            return Err(SignatureError::NoSuchKey("anybody could sign for it"));
        }
        Ok(Self(key.to_bytes()))
    }
}

impl Serialize for PolicyPublicKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PolicyPublicKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl fmt::Debug for PolicyKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PolicyKey({})", self.public())
    }
}

impl Subject {
    fn title(self) -> &'static str {
        match self {
            Self::Privacy => "theriac privacy policy signature v1",
            Self::Healing => "theriac healing policy signature v1",
            Self::Report => "theriac privacy report signature v1",
            Self::Approval => "theriac approval signature v1",
            Self::Reinstatement => "theriac reinstatement signature v1",
        }
    }

    fn signed_bytes(self, text: &str) -> Vec<u8> {
        let prefix: &[u8] = match self {
            Self::Privacy => b"theriac privacy policy v1\n\0",
            Self::Healing => b"theriac healing policy v1\n\0",
            Self::Report => b"theriac privacy report v1\n\0",
            Self::Approval => b"theriac approval v1\n\0",
            Self::Reinstatement => b"theriac reinstatement v1\n\0",
        };
        [prefix, text.as_bytes()].concat()
    }
}

fn bytes<const N: usize>(hex: &str) -> Option<[u8; N]> {
    HEXLOWER.decode(hex.as_bytes()).ok()?.try_into().ok()
}

const PUBLIC: &str = "thpk1_";
const PRIVATE: &str = "thps1_";

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# reviewed\nsite = \"site-a\"\nepsilon = 4.0\n";

    #[test]
    fn a_signature_over_one_kind_of_policy_is_none_over_another() {
        let signed = key(1).sign_text(Subject::Healing, TEXT);
        let public = key(1).public();
        assert_eq!(signed.verify_text(Subject::Healing, TEXT, public), Ok(()));
        assert_eq!(signed.verify(TEXT, public), Err(SignatureError::Format));
        // Nor with its title exchanged.
        let forged = signed.to_string().replace("healing", "privacy");
        let forged: PolicySignature = forged.parse().unwrap();
        assert_eq!(forged.verify(TEXT, public), Err(SignatureError::Altered(public)));
    }

    fn key(byte: u8) -> PolicyKey {
        PolicyKey::from_seed(&[byte; 32])
    }

    fn place(text: &str, signature: Option<&str>) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("privacy.toml");
        std::fs::write(&path, text).unwrap();
        if let Some(signature) = signature {
            std::fs::write(signature_path(&path), signature).unwrap();
        }
        (folder, path)
    }

    #[test]
    fn a_signed_policy_is_taken_and_remembers_who_signed() {
        let signature = key(1).sign(TEXT).unwrap();
        let (_folder, path) = place(TEXT, Some(&signature.to_string()));
        let policy = Policy::load_signed(&path, key(1).public()).unwrap();
        assert_eq!(policy.signature(), Some(&signature));
        assert_eq!(policy.hash(), Policy::parse(TEXT).unwrap().hash());
    }

    #[test]
    fn an_unsigned_policy_is_none() {
        let (_folder, path) = place(TEXT, None);
        let refused = Policy::load_signed(&path, key(1).public()).unwrap_err();
        assert!(matches!(refused, PolicyError::Unsigned { .. }), "{refused}");
        assert!(refused.to_string().contains("privacy sign"), "{refused}");
    }

    #[test]
    fn every_changed_byte_of_the_text_is_found() {
        let signature = key(1).sign(TEXT).unwrap();
        for byte in 0..TEXT.len() {
            let mut changed = TEXT.as_bytes().to_vec();
            changed[byte] ^= 1;
            let changed = String::from_utf8(changed).unwrap();
            let (_folder, path) = place(&changed, Some(&signature.to_string()));
            let refused = Policy::load_signed(&path, key(1).public()).unwrap_err();
            let altered = matches!(
                refused,
                PolicyError::Signature {
                    source: SignatureError::Altered(_),
                    ..
                }
            );
            assert!(altered, "byte {byte}: {refused}");
        }
    }

    #[test]
    fn somebody_elses_signature_is_not_taken() {
        let signature = key(2).sign(TEXT).unwrap().to_string();
        // Neither as it is, nor under the pinned key's name.
        let renamed = signature.replace(&key(2).public().to_string(), &key(1).public().to_string());
        for text in [signature, renamed] {
            let (_folder, path) = place(TEXT, Some(&text));
            assert!(Policy::load_signed(&path, key(1).public()).is_err(), "{text}");
        }
    }

    #[test]
    fn damaged_signatures_and_keys_are_errors() {
        let whole = key(1).sign(TEXT).unwrap().to_string();
        for bad in [
            "",
            "x",
            &whole[..whole.len() - 3],
            &whole.replace("v1", "v2"),
            &format!("{whole}more\n"),
        ] {
            assert!(bad.parse::<PolicySignature>().is_err(), "`{bad}` was taken");
        }
        let zero = format!("thpk1_{}", "0".repeat(64));
        for bad in ["", "thpk1_", "thpk1_12", &zero, &key(1).to_text()] {
            assert!(bad.parse::<PolicyPublicKey>().is_err(), "`{bad}` was taken");
        }
        assert!(PolicyKey::from_text("thpk1_00").is_err());
        let read = PolicyKey::from_text(&key(3).to_text()).unwrap();
        assert_eq!(read.public(), key(3).public());
        assert!(!format!("{:?}", key(3)).contains("thps1_"));
    }

    #[test]
    fn what_is_no_policy_is_not_signed() {
        assert!(key(1).sign("site = \"site-a\"\nepsilon = 0\n").is_err());
    }
}
