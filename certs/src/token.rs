//! The join token: what an operator hands to a new site.
//!
//! ```text
//! thrc1_ + base32(fingerprint 32 ‖ id 8 ‖ secret 16 ‖ CRC-32 4)      96 characters of a-z and 2-7
//! ```
//!
//! The fingerprint lets the edge recognise the aggregator *before* it sends the secret. 60 bytes fill base32 exactly,
//! so one token has one spelling. CRC-32 finds every change within 32 neighbouring bits: any one character and any
//! two neighbouring characters.

use std::fmt;
use std::str::FromStr;

use data_encoding::{Encoding, Specification};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

const PREFIX: &str = "thrc1_";
const BODY_BYTES: usize = 56;
const TEXT_CHARACTERS: usize = 96;

/// Why a text is no join token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TokenError {
    /// It does not begin as this version's tokens do.
    #[error(
        "this is no join token of this version: it begins with `{PREFIX}`; ask for one with `theriac-aggregator token create`"
    )]
    Prefix,
    /// Cut off, or something was added.
    #[error(
        "the join token has {found} characters after `{PREFIX}`, {TEXT_CHARACTERS} are expected; copy it whole"
    )]
    Length {
        /// What was found.
        found: usize,
    },
    /// A character that no token has.
    #[error("the join token has a character that is not a-z or 2-7 at position {position}; copy it again")]
    Character {
        /// Counted from 0, after the prefix.
        position: usize,
    },
    /// The checksum is wrong.
    #[error("the join token is mistyped: its checksum is wrong; copy it again")]
    Checksum,
    /// The system gave no random numbers.
    #[error("the system gives no random numbers: {0}")]
    Entropy(String),
}

/// Lets one named site enrol once. `Display` shows the secret, `Debug` does not; it is wiped on drop.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// SHA-256 of the certificate of the authority for aggregators.
    pub aggregator_authority_fingerprint: [u8; 32],
    /// Public part: finds the record.
    pub id: [u8; 8],
    /// Secret part, 128 bits.
    pub secret: [u8; 16],
}

impl JoinToken {
    /// A token with fresh id and secret.
    ///
    /// # Errors
    /// [`TokenError::Entropy`].
    pub fn generate(aggregator_authority_fingerprint: [u8; 32]) -> Result<Self, TokenError> {
        let mut token = Self {
            aggregator_authority_fingerprint,
            id: [0; 8],
            secret: [0; 16],
        };
        let entropy = |error: getrandom::Error| TokenError::Entropy(error.to_string());
        getrandom::fill(&mut token.id).map_err(entropy)?;
        getrandom::fill(&mut token.secret).map_err(entropy)?;
        Ok(token)
    }

    /// What the aggregator stores instead of the secret.
    pub fn secret_hash(&self) -> [u8; 32] {
        secret_hash(&self.id, &self.secret)
    }
}

impl Drop for JoinToken {
    fn drop(&mut self) {
        self.secret.zeroize();
    }
}

impl ZeroizeOnDrop for JoinToken {}

/// What the aggregator stores instead of a token's secret: SHA-256 over a label, the id and the secret. The secret
/// has 128 random bits, so no slow hash is needed.
pub fn secret_hash(id: &[u8; 8], secret: &[u8; 16]) -> [u8; 32] {
    Sha256::new()
        .chain_update(b"theriac join token 1")
        .chain_update(id)
        .chain_update(secret)
        .finalize()
        .into()
}

/// Whether a secret is the one that was stored, in constant time.
pub fn secret_matches(id: &[u8; 8], secret: &[u8; 16], stored_hash: &[u8; 32]) -> bool {
    secret_hash(id, secret).ct_eq(stored_hash).into()
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken")
            .field("id", &data_encoding::HEXLOWER.encode(&self.id))
            .field("secret", &"[redacted]")
            .finish_non_exhaustive()
    }
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = Zeroizing::new(Vec::with_capacity(BODY_BYTES + 4));
        bytes.extend_from_slice(&self.aggregator_authority_fingerprint);
        bytes.extend_from_slice(&self.id);
        bytes.extend_from_slice(&self.secret);
        let checksum = crc32(&bytes);
        bytes.extend_from_slice(&checksum.to_be_bytes());
        let text = Zeroizing::new(base32().encode(&bytes));
        write!(f, "{PREFIX}{}", text.as_str())
    }
}

impl FromStr for JoinToken {
    type Err = TokenError;

    /// Reads a token; white space around it is ignored.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let body = text.trim().strip_prefix(PREFIX).ok_or(TokenError::Prefix)?;
        if body.len() != TEXT_CHARACTERS {
            return Err(TokenError::Length {
                found: body.chars().count(),
            });
        }
        let bytes =
            Zeroizing::new(
                base32()
                    .decode(body.as_bytes())
                    .map_err(|error| TokenError::Character {
                        position: error.position,
                    })?,
            );
        let (body, checksum) = bytes.split_at(BODY_BYTES);
        if crc32(body).to_be_bytes() != *checksum {
            return Err(TokenError::Checksum);
        }
        let mut token = Self {
            aggregator_authority_fingerprint: [0; 32],
            id: [0; 8],
            secret: [0; 16],
        };
        token
            .aggregator_authority_fingerprint
            .copy_from_slice(&body[..32]);
        token.id.copy_from_slice(&body[32..40]);
        token.secret.copy_from_slice(&body[40..]);
        Ok(token)
    }
}

/// Lower-case base32 (RFC 4648 alphabet) without padding.
#[expect(
    clippy::expect_used,
    reason = "the specification is a constant and a test builds it"
)]
fn base32() -> Encoding {
    let mut specification = Specification::new();
    specification.symbols.push_str("abcdefghijklmnopqrstuvwxyz234567");
    specification
        .encoding()
        .expect("32 distinct symbols are a valid base")
}

/// CRC-32 of IEEE 802.3, reflected, polynomial 0x04C11DB7.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| {
        if crc & 1 == 1 {
            (crc >> 1) ^ 0xEDB8_8320
        } else {
            crc >> 1
        }
    };
    !bytes
        .iter()
        .fold(u32::MAX, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tokens() -> impl Strategy<Value = JoinToken> {
        (any::<[u8; 32]>(), any::<[u8; 8]>(), any::<[u8; 16]>()).prop_map(
            |(aggregator_authority_fingerprint, id, secret)| JoinToken {
                aggregator_authority_fingerprint,
                id,
                secret,
            },
        )
    }

    proptest! {
        #[test]
        fn token_survives_text(token in tokens()) {
            let text = token.to_string();
            prop_assert_eq!(text.len(), PREFIX.len() + TEXT_CHARACTERS);
            prop_assert_eq!(text.parse::<JoinToken>(), Ok(token.clone()));
            prop_assert_eq!(format!(" {text}\n").parse::<JoinToken>(), Ok(token));
        }

        #[test]
        fn one_changed_character_is_always_refused(token in tokens(), to in any::<char>()) {
            let text: Vec<char> = token.to_string().chars().collect();
            for position in 0..text.len() {
                // Also every character of the alphabet: the likeliest slip.
                for to in "abcdefghijklmnopqrstuvwxyz234567".chars().chain([to, text[position].to_ascii_uppercase()]) {
                    let mut changed = text.clone();
                    changed[position] = to;
                    if changed != text {
                        let changed: String = changed.into_iter().collect();
                        prop_assert!(changed.parse::<JoinToken>().is_err(), "{} was taken", changed);
                    }
                }
            }
        }

        #[test]
        fn two_swapped_neighbours_are_always_refused(token in tokens()) {
            let text: Vec<char> = token.to_string().chars().collect();
            for position in 1..text.len() {
                let mut changed = text.clone();
                changed.swap(position - 1, position);
                if changed != text {
                    let changed: String = changed.into_iter().collect();
                    prop_assert!(changed.parse::<JoinToken>().is_err());
                }
            }
        }

        #[test]
        fn any_text_is_refused_or_a_token(text in "\\PC{0,120}") {
            // Nothing may panic, whatever is pasted.
            if let Ok(token) = text.parse::<JoinToken>() {
                prop_assert_eq!(token.to_string(), text.trim());
            }
        }
    }

    #[test]
    fn crc_has_the_published_check_value() {
        // "Check" of CRC-32/ISO-HDLC in the catalogue of parametrised CRC algorithms.
        assert_eq!(crc32(b"123456789"), 0xCBF4_3926);
    }

    #[test]
    fn secret_is_told_only_on_purpose() {
        let token = JoinToken::generate([7; 32]).unwrap();
        let secret = data_encoding::HEXLOWER.encode(&token.secret);
        let debug = format!("{token:?}");
        assert!(debug.contains("[redacted]") && !debug.contains(&secret));
        assert_ne!(token.secret, JoinToken::generate([7; 32]).unwrap().secret);
    }

    #[test]
    fn the_stored_hash_recognises_the_secret_and_nothing_else() {
        let token = JoinToken::generate([7; 32]).unwrap();
        let stored = token.secret_hash();
        assert!(secret_matches(&token.id, &token.secret, &stored));
        assert!(!secret_matches(&[0; 8], &token.secret, &stored));
        assert!(!secret_matches(&token.id, &[0; 16], &stored));
    }

    #[test]
    fn errors_say_what_is_wrong() {
        let text = JoinToken::generate([7; 32]).unwrap().to_string();
        assert_eq!("thrc9_abc".parse::<JoinToken>(), Err(TokenError::Prefix));
        assert_eq!(
            text[..50].parse::<JoinToken>(),
            Err(TokenError::Length { found: 44 })
        );
        let shouted = text.replacen(&text[6..7], "!", 1);
        assert_eq!(
            shouted.parse::<JoinToken>(),
            Err(TokenError::Character { position: 0 })
        );
    }
}
