//! Simulated requests: statement shapes with made-up values. Never a value that somebody sent.

use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};
use tokio_postgres::Statement;
use tokio_postgres::types::{ToSql, Type};

use crate::postgres::PostgresError;
use crate::postgres::session::{Session, code};

/// A statement with `$1`, `$2` … for its values.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Template {
    /// The statement.
    pub sql: String,
    /// How often it is sent, relative to the others.
    #[serde(default = "one")]
    pub weight: u32,
}

fn one() -> u32 {
    1
}

/// What the answers must satisfy.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Criteria {
    /// Largest 99th percentile of the time for an answer.
    pub max_p99: Duration,
    /// Largest share of requests that end in an error that is not the fault of the made-up value, 0 to 1.
    pub max_error: f64,
}

impl Default for Criteria {
    fn default() -> Self {
        Self {
            max_p99: Duration::from_secs(1),
            max_error: 0.0,
        }
    }
}

/// What came back.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Answers {
    /// Times of all requests that were answered, unsorted.
    pub latencies: Vec<Duration>,
    /// Requests that a constraint or a type refused because of the made-up value. They count as answered.
    pub refused: u32,
    /// Requests that failed otherwise.
    pub errors: u32,
    /// The first of those.
    pub first_error: Option<String>,
    /// Sampled shapes that could not be sent: a table of a session, a type without made-up values.
    pub left_out: usize,
}

/// What is sent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Statements<'a> {
    /// What somebody wrote into the configuration: each must be one that can be sent, and is sent at least once.
    pub(super) configured: &'a [Template],
    /// What the server's statistics had: what cannot be sent is left out.
    pub(super) sampled: &'a [Template],
}

/// Why the requests were not made.
#[derive(Debug)]
pub(super) enum NotSent {
    /// The server does not take one, whose number from 1 is in the error.
    Refused(PostgresError),
    /// No value can be made up for a parameter of a configured statement, of this type.
    NoValue(usize, String),
    /// Time was over before a configured statement was sent.
    Late(usize),
}

impl Answers {
    /// The 99th percentile, nearest rank.
    pub fn p99(&self) -> Duration {
        let mut sorted = self.latencies.clone();
        sorted.sort_unstable();
        let rank = (sorted.len() * 99).div_ceil(100).max(1);
        sorted.get(rank - 1).copied().unwrap_or_default()
    }

    /// In words.
    pub fn words(&self) -> String {
        format!(
            "{} requests ({} refused for their made-up value, {} errors, {} sampled shapes left out), p99 {:?}",
            self.latencies.len(),
            self.refused,
            self.errors,
            self.left_out,
            self.p99()
        )
    }
}

impl Criteria {
    /// # Errors
    /// What is not satisfied, with the value found and the limit.
    pub fn judge(&self, answers: &Answers) -> Result<(), String> {
        let sent = answers.latencies.len() + answers.errors as usize;
        let share = f64::from(answers.errors) / sent.max(1) as f64;
        if share > self.max_error {
            return Err(format!(
                "{} of {sent} requests failed ({:.4} allowed); the first: {}",
                answers.errors,
                self.max_error,
                answers.first_error.as_deref().unwrap_or("-")
            ));
        }
        let p99 = answers.p99();
        if p99 > self.max_p99 {
            return Err(format!("p99 is {p99:?}, {:?} allowed", self.max_p99));
        }
        Ok(())
    }
}

/// Whether a statement of the server's statistics is a shape: it reads or changes rows, and every value in it was replaced by a
/// parameter. Utility statements keep their literals (passwords among them) and are none.
pub fn is_shape(sql: &str) -> bool {
    let sql = sql.trim_start();
    let word: String = sql.chars().take_while(char::is_ascii_alphabetic).collect();
    let known = ["select", "insert", "update", "delete", "with", "merge"];
    if !known.contains(&word.to_ascii_lowercase().as_str())
        || sql.contains(['\'', ';'])
        || sql.len() > SHAPE_MAX
    {
        return false;
    }
    // A digit belongs to a name (`t1`) or to a parameter (`$1`); else it is a value. What follows a dollar elsewhere quotes one.
    let (mut in_word, mut dollar) = (false, false);
    for letter in sql.chars() {
        if dollar || (letter.is_ascii_digit() && !in_word) {
            if !dollar || !letter.is_ascii_digit() {
                return false;
            }
            (dollar, in_word) = (false, true);
        } else if letter == '$' && !in_word {
            dollar = true;
        } else {
            in_word = letter.is_alphanumeric() || letter == '_' || letter == '$';
        }
    }
    !dollar
}

/// Sends requests one after the other, each in a transaction that is taken back, until there were so many or the time is over. Configured statements
/// come first, once each, then all by their weights.
///
/// # Errors
/// [`NotSent`], for configured statements alone.
pub(super) async fn send(
    session: &Session,
    statements: Statements<'_>,
    requests: u32,
    limit: Duration,
) -> Result<Answers, NotSent> {
    let begun = Instant::now();
    let mut answers = Answers::default();
    let mut ready: Vec<(Statement, u64)> = Vec::new();
    let configured = statements.configured.len();
    for (at, template) in statements.configured.iter().chain(statements.sampled).enumerate() {
        let prepared = session.client().prepare(&template.sql).await;
        let unknown = |statement: &Statement| statement.params().iter().find(|kind| !can_make(kind)).cloned();
        match prepared {
            Ok(statement) => match unknown(&statement) {
                None => ready.push((statement, u64::from(template.weight.max(1)))),
                Some(kind) if at < configured => {
                    return Err(NotSent::NoValue(at + 1, kind.name().to_owned()));
                }
                Some(_) => answers.left_out += 1,
            },
            // A server that went away has taken none, whoever's it is.
            Err(error) if at < configured || session.client().is_closed() => {
                let what = format!("statement {}", at + 1);
                let error = crate::postgres::session::failed(&what, &error);
                return Err(NotSent::Refused(error));
            }
            Err(_) => answers.left_out += 1,
        }
    }
    let total: u64 = ready.iter().map(|(_, weight)| weight).sum();
    let mut random = Random(SEED);
    for request in 0..requests as usize {
        if total == 0 {
            break;
        }
        if begun.elapsed() > limit {
            if request < configured {
                return Err(NotSent::Late(request + 1));
            }
            break;
        }
        let mut at = random.next() % total;
        let by_weight = || {
            ready.iter().find(|(_, weight)| {
                let here = at < *weight;
                at = at.saturating_sub(*weight);
                here
            })
        };
        let Some((statement, _)) = ready[..configured].get(request).or_else(by_weight) else {
            break;
        };
        let values: Vec<Box<dyn ToSql + Sync + Send>> = statement
            .params()
            .iter()
            .filter_map(|kind| random.value(kind))
            .collect();
        let borrowed: Vec<&(dyn ToSql + Sync)> = values
            .iter()
            .map(|value| value.as_ref() as &(dyn ToSql + Sync))
            .collect();
        let begun = session.client().batch_execute("begin").await;
        let sent = Instant::now();
        let answer = session.client().query(statement, &borrowed).await;
        let took = sent.elapsed();
        // Taken back: a single statement of a longer transaction would leave the data out of balance.
        let ended = session.client().batch_execute("rollback").await;
        let answer = answer.and_then(|rows| begun.and(ended).map(|()| rows));
        match answer {
            Ok(_rows) => answers.latencies.push(took),
            Err(error)
                if code(&error).is_some_and(|code| code.starts_with("22") || code.starts_with("23")) =>
            {
                answers.latencies.push(took);
                answers.refused += 1;
            }
            Err(error) => {
                answers.errors += 1;
                let words = crate::postgres::session::failed("request", &error).to_string();
                answers.first_error.get_or_insert(words);
                if session.client().is_closed() {
                    break;
                }
            }
        }
    }
    Ok(answers)
}

fn can_make(kind: &Type) -> bool {
    Random(1).value(kind).is_some()
}

/// splitmix64: reproducible, and nothing depends on its quality.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// Small whole numbers, since keys usually begin at 1.
    fn value(&mut self, kind: &Type) -> Option<Box<dyn ToSql + Sync + Send>> {
        let number = u32::try_from(self.next() % 100_000).unwrap_or(0) + 1;
        Some(match *kind {
            Type::INT2 => Box::new(i16::try_from(number % 100).unwrap_or(1)),
            Type::INT4 => Box::new(number.cast_signed()),
            Type::INT8 => Box::new(i64::from(number)),
            Type::OID => Box::new(number),
            Type::FLOAT4 => Box::new(1.0_f32),
            Type::FLOAT8 => Box::new(f64::from(number)),
            Type::TEXT | Type::VARCHAR | Type::BPCHAR | Type::NAME => Box::new(format!("v{number}")),
            Type::BOOL => Box::new(number.is_multiple_of(2)),
            Type::TIMESTAMP | Type::TIMESTAMPTZ => Box::new(SystemTime::now()),
            Type::BYTEA => Box::new(number.to_be_bytes().to_vec()),
            _ => return None,
        })
    }
}

const SEED: u64 = 0x7468_6572_6961_6321;
const SHAPE_MAX: usize = 16 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_statements_without_values_are_shapes() {
        for good in [
            "SELECT abalance FROM pgbench_accounts WHERE aid = $1",
            "update t1 set c2 = c2 + $1 where id = $2",
            "insert into log_2024 (a, b) values ($1, $2), ($3, $4)",
            "with x as (select $1::int8 as n) select * from x",
        ] {
            assert!(is_shape(good), "{good}");
        }
        for bad in [
            "alter user app password 'secret'",
            "select * from t where name = 'ann'",
            "select * from t where id = 17",
            "select $$secret$$",
            "select $tag$secret$tag$",
            "set x = y",
            "copy t from stdin",
            "select 1; drop table t",
            "select * from t limit 5",
            "",
        ] {
            assert!(!is_shape(bad), "{bad}");
        }
    }

    #[test]
    fn answers_are_judged_by_share_of_errors_and_by_p99() {
        let criteria = Criteria {
            max_p99: Duration::from_millis(50),
            max_error: 0.01,
        };
        let mut answers = Answers {
            latencies: vec![Duration::from_millis(10); 99],
            ..Answers::default()
        };
        assert_eq!(criteria.judge(&answers), Ok(()));
        answers.errors = 1;
        assert_eq!(criteria.judge(&answers), Ok(()), "one of a hundred is allowed");
        answers.errors = 2;
        assert!(criteria.judge(&answers).unwrap_err().contains("2 of 101"));
        answers.errors = 0;
        answers.latencies.extend([Duration::from_millis(60); 2]);
        assert!(criteria.judge(&answers).unwrap_err().contains("p99"));
    }
}
