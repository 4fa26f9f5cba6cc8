//! Keys and certificates on disk: PEM, private files with mode 0600, written durably.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use data_encoding::BASE64;
use rustls_pki_types::pem::{self, PemObject};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use zeroize::Zeroizing;

/// Largest file that is read as PEM, in bytes.
const PEM_BYTES_MAX: u64 = 64 * 1024;

/// Why a key or certificate file cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// The operating system said no.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// Others may read a private key.
    #[error("{} holds a private key but has mode {mode:04o}; run `chmod 600` on it, and make new keys if others could have read it", path.display())]
    TooWide {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// It is no PEM file, or lacks what it should hold.
    #[error("{} is unreadable: it has no {missing}; restore it from a backup or enrol again", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What was looked for.
        missing: &'static str,
    },
    /// It is far larger than any key or certificate.
    #[error("{} has {bytes} bytes; a key or certificate file has at most {PEM_BYTES_MAX}", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
}

/// Writes a public certificate (DER) as PEM, mode 0644, durably.
///
/// # Errors
/// [`FileError::Io`].
pub fn save_certificate(path: &Path, der: &[u8]) -> Result<(), FileError> {
    replace(path, encode("CERTIFICATE", der).as_bytes(), 0o644, None)
}

/// Reads the first certificate of a PEM file, as DER.
///
/// # Errors
/// [`FileError::Io`], [`FileError::TooLarge`], [`FileError::Unreadable`].
pub fn load_certificate(path: &Path) -> Result<Vec<u8>, FileError> {
    let text = read(path, false)?;
    let certificate = certificates(path, &text)?.into_iter().next();
    certificate.ok_or_else(|| unreadable(path, "certificate in PEM form"))
}

/// A private key (PKCS#8 DER) with its certificates (DER), leaf first.
pub(crate) struct KeyFile {
    pub(crate) key: Zeroizing<Vec<u8>>,
    pub(crate) certificates: Vec<Vec<u8>>,
}

/// Writes key and certificates as one file, mode 0600, so that both change in one rename. The file that was there
/// is kept as `previous`.
pub(crate) fn save_key(path: &Path, file: &KeyFile, previous: Option<&Path>) -> Result<(), FileError> {
    let mut text = encode("PRIVATE KEY", &file.key);
    for certificate in &file.certificates {
        text.push_str(&encode("CERTIFICATE", certificate));
    }
    replace(path, text.as_bytes(), 0o600, previous)
}

/// Reads what [`save_key`] wrote.
pub(crate) fn load_key(path: &Path) -> Result<KeyFile, FileError> {
    let text = read(path, true)?;
    let key =
        PrivatePkcs8KeyDer::from_pem_slice(&text).map_err(|_| unreadable(path, "private key in PEM form"))?;
    Ok(KeyFile {
        key: Zeroizing::new(key.secret_pkcs8_der().to_vec()),
        certificates: certificates(path, &text)?,
    })
}

/// Removes a file durably; one that is not there is fine.
pub(crate) fn remove(path: &Path) -> Result<(), FileError> {
    match fs::remove_file(path) {
        Ok(()) => sync_directory(path),
        Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(FileError::Io {
            action: "remove",
            path: path.to_owned(),
            source,
        }),
    }
}

fn certificates(path: &Path, text: &[u8]) -> Result<Vec<Vec<u8>>, FileError> {
    CertificateDer::pem_slice_iter(text)
        .map(|item| item.map(|der| der.as_ref().to_vec()))
        .collect::<Result<_, pem::Error>>()
        .map_err(|_| unreadable(path, "readable certificate"))
}

fn read(path: &Path, private: bool) -> Result<Zeroizing<Vec<u8>>, FileError> {
    let io = |action| {
        move |source| FileError::Io {
            action,
            path: path.to_owned(),
            source,
        }
    };
    let file = File::open(path).map_err(io("open"))?;
    let metadata = file.metadata().map_err(io("inspect"))?;
    let mode = metadata.mode() & 0o7777;
    if private && mode & 0o077 != 0 {
        return Err(FileError::TooWide {
            path: path.to_owned(),
            mode,
        });
    }
    if metadata.len() > PEM_BYTES_MAX {
        return Err(FileError::TooLarge {
            path: path.to_owned(),
            bytes: metadata.len(),
        });
    }
    // Room for all of it at once: a growing buffer would leave copies of the key behind.
    let mut text = Zeroizing::new(Vec::with_capacity(
        usize::try_from(PEM_BYTES_MAX).unwrap_or(usize::MAX),
    ));
    file.take(PEM_BYTES_MAX)
        .read_to_end(&mut text)
        .map_err(io("read"))?;
    Ok(text)
}

/// Write beside, sync, keep the old one, rename over, sync the directory: a crash leaves the old file or the new one.
fn replace(path: &Path, content: &[u8], mode: u32, previous: Option<&Path>) -> Result<(), FileError> {
    let io = |action| {
        move |source| FileError::Io {
            action,
            path: path.to_owned(),
            source,
        }
    };
    if let Some(directory) = path
        .parent()
        .filter(|directory| !directory.as_os_str().is_empty())
    {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(io("make the directory of"))?;
    }
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let beside = PathBuf::from(beside);
    // One left behind by a crash has the wrong content and perhaps the wrong mode.
    remove(&beside)?;
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&beside)
        .map_err(io("create"))?;
    file.write_all(content)
        .and_then(|()| file.sync_all())
        .map_err(io("write"))?;
    if let Some(previous) = previous
        && path.exists()
    {
        remove(previous)?;
        fs::hard_link(path, previous).map_err(io("keep the previous"))?;
    }
    fs::rename(&beside, path).map_err(io("replace"))?;
    sync_directory(path)
}

fn sync_directory(path: &Path) -> Result<(), FileError> {
    let directory = match path.parent() {
        Some(directory) if !directory.as_os_str().is_empty() => directory,
        _ => Path::new("."),
    };
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(|source| FileError::Io {
            action: "sync the directory",
            path: directory.to_owned(),
            source,
        })
}

fn encode(label: &str, der: &[u8]) -> Zeroizing<String> {
    let base64 = Zeroizing::new(BASE64.encode(der));
    let mut text = Zeroizing::new(String::with_capacity(
        base64.len() + base64.len() / 64 + 2 * label.len() + 40,
    ));
    text.push_str("-----BEGIN ");
    text.push_str(label);
    text.push_str("-----\n");
    let mut rest = base64.as_str();
    while !rest.is_empty() {
        let (line, after) = rest.split_at(rest.len().min(64));
        text.push_str(line);
        text.push('\n');
        rest = after;
    }
    text.push_str("-----END ");
    text.push_str(label);
    text.push_str("-----\n");
    text
}

fn unreadable(path: &Path, missing: &'static str) -> FileError {
    FileError::Unreadable {
        path: path.to_owned(),
        missing,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn sample() -> KeyFile {
        KeyFile {
            key: Zeroizing::new(vec![7; 130]),
            certificates: vec![vec![1; 300], vec![2; 64]],
        }
    }

    #[test]
    fn key_file_survives_disk_and_is_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/er/edge.pem");
        save_key(&path, &sample(), None).unwrap();
        let loaded = load_key(&path).unwrap();
        assert_eq!(*loaded.key, *sample().key);
        assert_eq!(loaded.certificates, sample().certificates);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(
            fs::metadata(dir.path().join("deep")).unwrap().mode() & 0o777,
            0o700
        );
    }

    #[test]
    fn refuses_a_key_that_others_can_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("edge.pem");
        save_key(&path, &sample(), None).unwrap();
        for mode in [0o640, 0o604, 0o660, 0o644] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            match load_key(&path).err() {
                Some(FileError::TooWide { mode: found, .. }) => assert_eq!(found, mode),
                other => panic!("mode {mode:o} gave {other:?}"),
            }
        }
    }

    #[test]
    fn keeps_the_previous_file() {
        let dir = tempfile::tempdir().unwrap();
        let (path, previous) = (dir.path().join("edge.pem"), dir.path().join("edge.previous.pem"));
        for key in [1, 2, 3] {
            let file = KeyFile {
                key: Zeroizing::new(vec![key; 40]),
                certificates: Vec::new(),
            };
            save_key(&path, &file, Some(&previous)).unwrap();
        }
        assert_eq!(load_key(&path).unwrap().key[0], 3);
        assert_eq!(load_key(&previous).unwrap().key[0], 2);
    }

    #[test]
    fn a_file_left_by_a_crash_is_no_obstacle() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("edge.pem");
        fs::write(dir.path().join("edge.pem.new"), "half").unwrap();
        save_key(&path, &sample(), None).unwrap();
        assert_eq!(load_key(&path).unwrap().certificates, sample().certificates);
    }

    #[test]
    fn says_what_an_unreadable_file_lacks() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("authority.pem");
        fs::write(&path, "no PEM at all").unwrap();
        let told = load_certificate(&path).unwrap_err().to_string();
        assert!(
            told.contains("authority.pem") && told.contains("no certificate"),
            "{told}"
        );
        fs::write(
            &path,
            "-----BEGIN CERTIFICATE-----\n%%%\n-----END CERTIFICATE-----\n",
        )
        .unwrap();
        assert!(matches!(
            load_certificate(&path),
            Err(FileError::Unreadable { .. })
        ));
        fs::write(&path, vec![b'a'; 70_000]).unwrap();
        assert!(matches!(
            load_certificate(&path),
            Err(FileError::TooLarge { bytes: 70_000, .. })
        ));
    }
}
