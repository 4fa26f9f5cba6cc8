//! A failure as a person meets it: a stable code, what happened, what to do next, and an exit code.

use std::fmt;
use std::io::{self, Write};
use std::process::ExitCode;

/// How the program ends. The numbers are part of the contract with users' scripts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// It was tried and failed (1). `doctor` and `status` use it for "not healthy".
    Failed = 1,
    /// The command line makes no sense (2).
    Usage = 2,
    /// Try again later, nothing is wrong here (75, `EX_TEMPFAIL`).
    Temporary = 75,
    /// The configuration is wrong (78, `EX_CONFIG`).
    Config = 78,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// What went wrong. Codes are documented in `docs/errors.md`, and a test holds the two together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Stable code such as `TH-E0101`.
    pub code: &'static str,
    /// What happened, with the value that caused it.
    pub message: String,
    /// What to do next.
    pub hint: Option<String>,
    /// How the program ends.
    pub exit: Exit,
}

impl Problem {
    /// A failure that ends with exit code 1.
    pub fn failed(code: &'static str, message: impl fmt::Display) -> Self {
        Self {
            code,
            message: message.to_string(),
            hint: None,
            exit: Exit::Failed,
        }
    }

    /// A wrong configuration, exit code 78.
    pub fn config(code: &'static str, message: impl fmt::Display) -> Self {
        Self {
            exit: Exit::Config,
            ..Self::failed(code, message)
        }
    }

    /// A wrong command line, exit code 2.
    pub fn usage(code: &'static str, message: impl fmt::Display) -> Self {
        Self {
            exit: Exit::Usage,
            ..Self::failed(code, message)
        }
    }

    /// What the parser of the command line said, which begins with `error: ` and ends with a word about `--help`; exit code 2.
    pub fn command_line(code: &'static str, said: &str) -> Self {
        let said = said.trim_end();
        let said = said.strip_prefix("error: ").unwrap_or(said);
        let said = said
            .rsplit_once("\n\nFor more information")
            .map_or(said, |(said, _)| said);
        Self::usage(code, said).hint("the same command with --help shows every option and an example")
    }

    /// Something that may work later, exit code 75.
    pub fn temporary(code: &'static str, message: impl fmt::Display) -> Self {
        Self {
            exit: Exit::Temporary,
            ..Self::failed(code, message)
        }
    }

    /// Adds what to do next.
    #[must_use]
    pub fn hint(mut self, hint: impl fmt::Display) -> Self {
        self.hint = Some(hint.to_string());
        self
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error[{}]: {}", self.code, self.message.trim_end())?;
        if let Some(hint) = &self.hint {
            write!(f, "\n  help: {}", hint.replace('\n', "\n        "))?;
        }
        Ok(())
    }
}

impl std::error::Error for Problem {}

/// Writes a problem for people and returns the program's exit code.
pub fn report(problem: &Problem, err: &mut dyn Write) -> ExitCode {
    // When standard error itself is gone there is nobody left to tell; the exit code still says it.
    let told: io::Result<()> = writeln!(err, "{problem}");
    drop(told);
    problem.exit.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_command_line_has_a_code_like_everything_else() {
        let said = "error: unexpected argument '--x' found\n\nUsage: edge run\n\nFor more information, try '--help'.\n";
        let problem = Problem::command_line("TH-E0001", said);
        assert_eq!(problem.exit, Exit::Usage);
        assert_eq!(
            problem.to_string(),
            "error[TH-E0001]: unexpected argument '--x' found\n\nUsage: edge run\n  \
             help: the same command with --help shows every option and an example"
        );
    }

    #[test]
    fn says_code_message_and_what_to_do() {
        let problem = Problem::config("TH-E0101", "no such file: a.toml\n").hint("run `init` first");
        let mut out = Vec::new();
        let code = report(&problem, &mut out);
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "error[TH-E0101]: no such file: a.toml\n  help: run `init` first\n"
        );
        assert_eq!(format!("{code:?}"), format!("{:?}", ExitCode::from(78)));
    }
}
