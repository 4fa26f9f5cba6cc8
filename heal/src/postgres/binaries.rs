//! Where the server's programs are.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::PostgresError;

/// The directory of one installation's programs. All are taken from there, so that their versions agree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PgBinaries {
    dir: PathBuf,
    major: u32,
}

impl PgBinaries {
    /// Looks in this process's environment; see [`Self::find`].
    ///
    /// # Errors
    /// [`PostgresError::NoBinaries`].
    pub fn find_here() -> Result<Self, PostgresError> {
        Self::find(&|name| std::env::var_os(name))
    }

    /// `THERIAC_PG_BIN` and nothing else when it is set; then the true directory of the `pg_ctl` on `PATH`; then what `pg_config
    /// --bindir` says; then the newest of Debian's directories.
    ///
    /// # Errors
    /// [`PostgresError::NoBinaries`] tells where was looked.
    pub fn find(variable: &dyn Fn(&str) -> Option<OsString>) -> Result<Self, PostgresError> {
        if let Some(named) = variable(NAMED).filter(|value| !value.is_empty()) {
            let dir = PathBuf::from(named);
            return Self::in_dir(&dir).map_err(|why| PostgresError::NoBinaries {
                looked: format!("{NAMED} is {}: {why}", dir.display()),
            });
        }
        let mut looked = Vec::new();
        let path = variable("PATH").unwrap_or_default();
        let on_path = |name: &str| {
            std::env::split_paths(&path)
                .map(|dir| dir.join(name))
                .find(|file| file.is_file())
        };
        match on_path("pg_ctl").and_then(|file| file.canonicalize().ok()) {
            Some(file) => match Self::in_dir(file.parent().unwrap_or(Path::new("/"))) {
                Ok(found) => return Ok(found),
                Err(why) => looked.push(format!("pg_ctl is {}, yet {why}", file.display())),
            },
            None => looked.push("no pg_ctl on PATH".to_owned()),
        }
        match on_path("pg_config").and_then(|file| said(&file, &["--bindir"])) {
            Some(dir) => match Self::in_dir(Path::new(&dir)) {
                Ok(found) => return Ok(found),
                Err(why) => looked.push(format!("pg_config --bindir is {dir}, yet {why}")),
            },
            None => looked.push("no pg_config on PATH".to_owned()),
        }
        for dir in debian() {
            match Self::in_dir(&dir) {
                Ok(found) => return Ok(found),
                Err(why) => looked.push(why),
            }
        }
        looked.push(format!("nothing usable in {DEBIAN}/*/bin"));
        Err(PostgresError::NoBinaries {
            looked: looked.join("; "),
        })
    }

    fn in_dir(dir: &Path) -> Result<Self, String> {
        if let Some(missing) = NEEDED.iter().find(|name| !dir.join(name).is_file()) {
            return Err(format!("{} has no {missing}", dir.display()));
        }
        let version = said(&dir.join("postgres"), &["--version"]).unwrap_or_default();
        let major =
            major_of(&version).ok_or_else(|| format!("{}/postgres says `{version}`", dir.display()))?;
        Ok(Self {
            dir: dir.to_owned(),
            major,
        })
    }

    /// One program's path.
    pub fn tool(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The major version, such as 15.
    pub fn major(&self) -> u32 {
        self.major
    }
}

/// `postgres (PostgreSQL) 15.18 (Debian 15.18-0)` is 15; `16beta1` is 16.
fn major_of(version: &str) -> Option<u32> {
    let number = version.split_once("(PostgreSQL) ")?.1;
    let digits: String = number.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

fn said(program: &Path, arguments: &[&str]) -> Option<String> {
    let out = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    out.status
        .success()
        .then(|| String::from_utf8_lossy(&out.stdout).trim().to_owned())
}

/// Newest first.
fn debian() -> Vec<PathBuf> {
    let mut found: Vec<(u32, PathBuf)> = std::fs::read_dir(DEBIAN)
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            Some((path.file_name()?.to_str()?.parse().ok()?, path.join("bin")))
        })
        .collect();
    found.sort_by_key(|(version, _)| std::cmp::Reverse(*version));
    found.into_iter().map(|(_, dir)| dir).collect()
}

/// Variable that names the directory.
const NAMED: &str = "THERIAC_PG_BIN";
const DEBIAN: &str = "/usr/lib/postgresql";
/// What checkpoints need. `pg_amcheck` and the extension beside it came with version 14.
const NEEDED: [&str; 6] = [
    "postgres",
    "pg_basebackup",
    "pg_verifybackup",
    "pg_amcheck",
    "pg_controldata",
    "pg_checksums",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_what_the_server_says() {
        assert_eq!(
            major_of("postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)"),
            Some(15)
        );
        assert_eq!(major_of("postgres (PostgreSQL) 17beta2"), Some(17));
        assert_eq!(major_of("mysqld 8"), None);
    }

    #[test]
    fn a_named_directory_without_the_programs_is_refused_and_told() {
        let dir = tempfile::tempdir().unwrap();
        let named = dir.path().as_os_str().to_owned();
        let refused = PgBinaries::find(&|name| (name == NAMED).then(|| named.clone()))
            .unwrap_err()
            .to_string();
        assert!(
            refused.contains("has no postgres") && refused.contains(NAMED),
            "{refused}"
        );
    }
}
