//! Sealing what leaves the host: authenticated encryption under a key that stays.
//!
//! ```text
//! object = "theriac-sealed 1\n" ‖ key id (8) ‖ salt (32) ‖ AES-256-GCM(part, additional data: all before it ‖ the object's name)
//! ```
//!
//! **Nonces.** Each object has a key of its own, HKDF-SHA256 (RFC 5869) of the key file's 32 bytes with a fresh random salt, and that
//! key seals this one message: its nonce is always zero and never used twice. No counter has to survive a crash, a restored
//! host or a second writer. Two objects share a key only when two of all the 256-bit salts are equal.
//!
//! **Names.** An object that holds a part of a file is named by HMAC-SHA256 of the part's SHA-256, so equal parts are stored once, and
//! who reads names alone cannot tell which known file is there. The name is bound into the seal: an object under
//! another's name does not open.

use std::fmt;
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::hkdf::{HKDF_SHA256, Salt};
use aws_lc_rs::hmac;
use data_encoding::HEXLOWER;

use super::OffsiteError;
use crate::checkpoint::work::parent;

/// What seals and opens. Its bytes are never shown.
#[derive(Clone)]
pub struct OffsiteKey {
    bytes: [u8; KEY_BYTES],
    id: [u8; ID_BYTES],
    names: hmac::Key,
}

impl fmt::Debug for OffsiteKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OffsiteKey({})", self.id())
    }
}

impl OffsiteKey {
    /// Makes a new key file, mode 0600, and syncs it. One that is there is never replaced: what it sealed would be lost.
    ///
    /// # Errors
    /// [`OffsiteError::Key`].
    pub fn create(path: &Path) -> Result<Self, OffsiteError> {
        let bytes = random().map_err(wrong(path))?;
        let mut file = fs::File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(wrong(path))?;
        let text = format!("{}\n", HEXLOWER.encode(&bytes));
        // Its name too must outlast a power cut, or copies could exist whose key does not.
        let written = file
            .write_all(text.as_bytes())
            .and_then(|()| file.sync_all())
            .and_then(|()| fs::File::open(parent(path))?.sync_all());
        whole_or_removed(path, written)?;
        Ok(Self::new(bytes))
    }

    /// Reads a key file.
    ///
    /// # Errors
    /// [`OffsiteError::Key`] when it is missing, can be read by others, or holds no 64 hexadecimal digits.
    pub fn load(path: &Path) -> Result<Self, OffsiteError> {
        let mode = fs::metadata(path).map_err(wrong(path))?.mode();
        if mode & 0o077 != 0 {
            let words = format!(
                "its mode is {:o}: `chmod 600` it, others can read it",
                mode & 0o777
            );
            return Err(wrong(path)(io::Error::other(words)));
        }
        let text = fs::read_to_string(path).map_err(wrong(path))?;
        let bytes = HEXLOWER
            .decode(text.trim().as_bytes())
            .ok()
            .and_then(|bytes| bytes.try_into().ok())
            .ok_or_else(|| wrong(path)(io::Error::other("it holds no 64 hexadecimal digits")))?;
        Ok(Self::new(bytes))
    }

    fn new(bytes: [u8; KEY_BYTES]) -> Self {
        let main = hmac::Key::new(hmac::HMAC_SHA256, &bytes);
        let mut id = [0; ID_BYTES];
        id.copy_from_slice(&hmac::sign(&main, b"theriac off-site key id").as_ref()[..ID_BYTES]);
        let names = hmac::sign(&main, b"theriac off-site names");
        Self {
            bytes,
            id,
            names: hmac::Key::new(hmac::HMAC_SHA256, names.as_ref()),
        }
    }

    /// What tells it from others, in hexadecimal; nothing of the key follows from it.
    pub fn id(&self) -> String {
        HEXLOWER.encode(&self.id)
    }

    /// The name of the object that holds the part with this SHA-256.
    pub(super) fn name(&self, sha256: &str) -> String {
        HEXLOWER.encode(hmac::sign(&self.names, sha256.as_bytes()).as_ref())
    }

    pub(super) fn seal(&self, name: &str, part: &[u8]) -> Result<Vec<u8>, OffsiteError> {
        let failed = || OffsiteError::Damaged {
            object: name.to_owned(),
            what: "cannot be sealed".to_owned(),
        };
        let salt: [u8; SALT_BYTES] = random().map_err(|_no_entropy| failed())?;
        let mut sealed = Vec::with_capacity(part.len() + OVERHEAD);
        sealed.extend_from_slice(MAGIC);
        sealed.extend_from_slice(&self.id);
        sealed.extend_from_slice(&salt);
        let known = [&sealed, name.as_bytes()].concat();
        let mut body = part.to_vec();
        self.own_key(&salt)
            .and_then(|key| {
                key.seal_in_place_append_tag(nonce(), Aad::from(&known), &mut body)
                    .ok()
            })
            .ok_or_else(failed)?;
        sealed.append(&mut body);
        Ok(sealed)
    }

    pub(super) fn open(&self, name: &str, sealed: &[u8]) -> Result<Vec<u8>, OffsiteError> {
        let damaged = |what: &str| OffsiteError::Damaged {
            object: name.to_owned(),
            what: what.to_owned(),
        };
        let (header, body) = sealed
            .split_at_checked(HEADER_BYTES)
            .filter(|(header, _)| header.starts_with(MAGIC))
            .ok_or_else(|| damaged("is cut or of another format"))?;
        let (id, salt) = header[MAGIC.len()..].split_at(ID_BYTES);
        if id != self.id {
            return Err(OffsiteError::OtherKey {
                object: name.to_owned(),
                sealed: HEXLOWER.encode(id),
                ours: self.id(),
            });
        }
        let known = [header, name.as_bytes()].concat();
        let mut body = body.to_vec();
        let opened = self.own_key(salt).and_then(|key| {
            let part = key.open_in_place(nonce(), Aad::from(&known), &mut body).ok()?;
            Some(part.len())
        });
        let length = opened.ok_or_else(|| damaged("was changed: its seal does not hold"))?;
        body.truncate(length);
        Ok(body)
    }

    /// The key of one object.
    fn own_key(&self, salt: &[u8]) -> Option<LessSafeKey> {
        let key = Salt::new(HKDF_SHA256, salt).extract(&self.bytes);
        let key = key.expand(&[b"theriac off-site object"], &AES_256_GCM).ok()?;
        Some(LessSafeKey::new(UnboundKey::from(key)))
    }
}

/// Removes a key file that was not written to its end: it would be in the way of the next attempt.
fn whole_or_removed(path: &Path, written: io::Result<()>) -> Result<(), OffsiteError> {
    if written.is_err()
        && let Err(error) = fs::remove_file(path)
    {
        tracing::warn!(path = %path.display(), %error, "incomplete key file not removed");
    }
    written.map_err(wrong(path))
}

fn nonce() -> Nonce {
    Nonce::assume_unique_for_key([0; 12])
}

fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| io::Error::other("the system gives no random bytes"))?;
    Ok(bytes)
}

fn wrong(path: &Path) -> impl Fn(io::Error) -> OffsiteError + use<> {
    let path = path.to_owned();
    move |source| OffsiteError::Key {
        path: path.clone(),
        source,
    }
}

const MAGIC: &[u8] = b"theriac-sealed 1\n";
const KEY_BYTES: usize = 32;
const ID_BYTES: usize = 8;
const SALT_BYTES: usize = 32;
const HEADER_BYTES: usize = MAGIC.len() + ID_BYTES + SALT_BYTES;
/// What sealing adds, with the tag of 16 bytes.
pub(super) const OVERHEAD: usize = HEADER_BYTES + 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flipped_bit_every_cut_and_another_name_is_noticed() {
        let key = OffsiteKey::new([7; KEY_BYTES]);
        let sealed = key.seal("a", b"state").unwrap();
        assert_eq!(sealed.len(), 5 + OVERHEAD);
        assert_eq!(key.open("a", &sealed).unwrap(), b"state");
        assert!(key.open("b", &sealed).is_err());
        for at in 0..sealed.len() {
            let mut other = sealed.clone();
            other[at] ^= 1;
            assert!(key.open("a", &other).is_err(), "byte {at}");
            assert!(key.open("a", &sealed[..at]).is_err(), "cut at {at}");
        }
        let other = OffsiteKey::new([8; KEY_BYTES]);
        assert!(matches!(
            other.open("a", &sealed),
            Err(OffsiteError::OtherKey { .. })
        ));
    }

    #[test]
    fn equal_parts_have_equal_names_and_never_equal_objects() {
        let key = OffsiteKey::new([7; KEY_BYTES]);
        assert_eq!(key.name("ab"), key.name("ab"));
        assert_ne!(key.name("ab"), OffsiteKey::new([8; KEY_BYTES]).name("ab"));
        assert_ne!(key.seal("a", b"x").unwrap(), key.seal("a", b"x").unwrap());
    }

    #[test]
    fn a_key_file_that_was_not_written_whole_is_in_nobody_s_way() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        fs::write(&path, "01").unwrap();
        let full = Err(io::ErrorKind::StorageFull.into());
        assert!(whole_or_removed(&path, full).is_err() && !path.exists());
        OffsiteKey::create(&path).unwrap();
        whole_or_removed(&path, Ok(())).unwrap();
        OffsiteKey::load(&path).unwrap();
    }

    #[test]
    fn key_files_are_private_and_never_replaced() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let made = OffsiteKey::create(&path).unwrap();
        assert_eq!(OffsiteKey::load(&path).unwrap().id(), made.id());
        assert!(!format!("{made:?}").contains(fs::read_to_string(&path).unwrap().trim()));
        assert!(OffsiteKey::create(&path).is_err());
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(OffsiteKey::load(&path).unwrap_err().to_string().contains("640"));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&path, "abc\n").unwrap();
        assert!(OffsiteKey::load(&path).is_err());
    }
}
