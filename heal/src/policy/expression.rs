//! The language of `when`: comparisons of what was diagnosed, joined by `and`, `or`, `not`. Total: no loops, no functions, no I/O; names
//! and types are checked when it is read, and its size is bounded, so that it always ends and never fails.
//!
//! ```text
//! diag.class == "hang" and diag.p >= 0.8
//! not (service.answers) or risk.p > 0.5
//! diag.class in ["hang", "memory_leak"]
//! ```
//!
//! What is not known (`risk.p` without a forecast) makes its comparison unknown, and unknown is never yes: `not` does not turn it into yes
//! either (Kleene's strong three-valued logic).

use std::fmt;

use serde::{Serialize, Serializer};

use super::evaluate::Facts;
use crate::types::FaultClass;

/// A checked expression; it remembers its text.
#[derive(Debug, Clone, PartialEq)]
pub struct Expression {
    text: String,
    root: Node,
}

/// Why a text is no [`Expression`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` at {at}: {reason}")]
pub struct ExpressionError {
    /// The text.
    pub text: String,
    /// Where, in characters from 1.
    pub at: usize,
    /// What is wrong and what is expected.
    pub reason: String,
}

#[derive(Debug, Clone, PartialEq)]
enum Node {
    And(Box<Node>, Box<Node>),
    Or(Box<Node>, Box<Node>),
    Not(Box<Node>),
    Class {
        of: Vec<FaultClass>,
        is: bool,
    },
    Helps {
        answer: &'static str,
        is: bool,
    },
    Number {
        name: Number,
        operator: Operator,
        value: f64,
    },
    Answers,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Number {
    Certainty,
    Risk,
    ActionsOfService,
    ActionsOfNode,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operator {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

#[derive(Debug, Clone, PartialEq)]
enum Token {
    Word(String),
    Text(String),
    Number(f64),
    Sign(&'static str),
}

impl Expression {
    /// Reads and checks an expression.
    ///
    /// # Errors
    /// [`ExpressionError`], with the place and the nearest known name.
    pub fn parse(text: &str) -> Result<Self, ExpressionError> {
        let wrong = |at: usize, reason: String| ExpressionError {
            text: text.to_owned(),
            at: at + 1,
            reason,
        };
        if text.len() > TEXT_MAX {
            return Err(wrong(0, format!("it is longer than {TEXT_MAX} bytes")));
        }
        let tokens = tokens(text).map_err(|(at, reason)| wrong(at, reason))?;
        let mut parser = Parser {
            tokens: &tokens,
            next: 0,
            end: text.chars().count(),
        };
        let root = parser.either(0).map_err(|(at, reason)| wrong(at, reason))?;
        if let Some((at, token)) = parser.tokens.get(parser.next) {
            return Err(wrong(
                *at,
                format!("{token} is one too many: join comparisons with and, or"),
            ));
        }
        Ok(Self {
            text: text.to_owned(),
            root,
        })
    }

    /// Whether it holds; `None` when something that it needs is not known.
    pub fn holds(&self, facts: &Facts) -> Option<bool> {
        self.root.holds(facts)
    }
}

impl fmt::Display for Expression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Serialize for Expression {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

impl Eq for Expression {}

impl Node {
    fn holds(&self, facts: &Facts) -> Option<bool> {
        match self {
            Self::And(a, b) => match (a.holds(facts), b.holds(facts)) {
                (Some(false), _) | (_, Some(false)) => Some(false),
                (Some(true), Some(true)) => Some(true),
                _ => None,
            },
            Self::Or(a, b) => match (a.holds(facts), b.holds(facts)) {
                (Some(true), _) | (_, Some(true)) => Some(true),
                (Some(false), Some(false)) => Some(false),
                _ => None,
            },
            Self::Not(a) => a.holds(facts).map(|holds| !holds),
            Self::Class { of, is } => Some(of.contains(&facts.class) == *is),
            Self::Helps { answer, is } => Some((facts.restart_helps.as_str() == *answer) == *is),
            Self::Number {
                name,
                operator,
                value,
            } => {
                let found = match name {
                    Number::Certainty => Some(facts.certainty),
                    Number::Risk => facts.risk,
                    Number::ActionsOfService => Some(f64::from(facts.actions_of_service)),
                    Number::ActionsOfNode => Some(f64::from(facts.actions_of_node)),
                };
                let found = found.filter(|found| found.is_finite())?;
                Some(match operator {
                    Operator::Equal => (found - value).abs() < EQUAL,
                    Operator::NotEqual => (found - value).abs() >= EQUAL,
                    Operator::Less => found < *value,
                    Operator::LessOrEqual => found <= *value,
                    Operator::Greater => found > *value,
                    Operator::GreaterOrEqual => found >= *value,
                })
            }
            Self::Answers => Some(facts.answers),
        }
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Word(word) => write!(f, "`{word}`"),
            Self::Text(text) => write!(f, "\"{text}\""),
            Self::Number(number) => write!(f, "{number}"),
            Self::Sign(sign) => write!(f, "`{sign}`"),
        }
    }
}

type Wrong = (usize, String);

fn tokens(text: &str) -> Result<Vec<(usize, Token)>, Wrong> {
    let characters: Vec<char> = text.chars().collect();
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(&c) = characters.get(at) {
        let begin = at;
        let run = |from: usize, belongs: &dyn Fn(char) -> bool| {
            characters[from..].iter().take_while(|c| belongs(**c)).count()
        };
        let token = if c.is_whitespace() {
            at += 1;
            continue;
        } else if c == '"' || c == '\'' {
            let length = run(at + 1, &|other| other != c);
            if characters.get(at + 1 + length) != Some(&c) {
                return Err((begin, "a quote is not closed".to_owned()));
            }
            at += length + 2;
            Token::Text(characters[begin + 1..begin + 1 + length].iter().collect())
        } else if c.is_ascii_digit() {
            at += run(at, &|c| c.is_ascii_digit() || c == '.');
            let digits: String = characters[begin..at].iter().collect();
            let number = digits.parse().ok().filter(|n: &f64| n.is_finite());
            Token::Number(number.ok_or((begin, format!("`{digits}` is no number")))?)
        } else if c.is_ascii_alphabetic() {
            at += run(at, &|c| c.is_ascii_alphanumeric() || c == '.' || c == '_');
            Token::Word(characters[begin..at].iter().collect())
        } else {
            let two: String = characters[at..characters.len().min(at + 2)].iter().collect();
            let sign = SIGNS.into_iter().find(|sign| two.starts_with(sign));
            let sign = sign.ok_or((begin, format!("`{c}` means nothing here")))?;
            at += sign.len();
            Token::Sign(sign)
        };
        found.push((begin, token));
        if found.len() > TOKENS_MAX {
            return Err((begin, format!("it has more than {TOKENS_MAX} words and signs")));
        }
    }
    Ok(found)
}

struct Parser<'a> {
    tokens: &'a [(usize, Token)],
    next: usize,
    end: usize,
}

impl Parser<'_> {
    fn either(&mut self, depth: usize) -> Result<Node, Wrong> {
        let mut left = self.both(depth)?;
        while self.word("or") {
            left = Node::Or(Box::new(left), Box::new(self.both(depth)?));
        }
        Ok(left)
    }

    fn both(&mut self, depth: usize) -> Result<Node, Wrong> {
        let mut left = self.one(depth)?;
        while self.word("and") {
            left = Node::And(Box::new(left), Box::new(self.one(depth)?));
        }
        Ok(left)
    }

    fn one(&mut self, depth: usize) -> Result<Node, Wrong> {
        if depth >= DEPTH_MAX {
            return Err((self.at(), format!("it is nested deeper than {DEPTH_MAX}")));
        }
        if self.word("not") {
            return Ok(Node::Not(Box::new(self.one(depth + 1)?)));
        }
        if self.sign("(") {
            let inner = self.either(depth + 1)?;
            return if self.sign(")") {
                Ok(inner)
            } else {
                Err((self.at(), "a `)` is missing".to_owned()))
            };
        }
        self.comparison()
    }

    fn comparison(&mut self) -> Result<Node, Wrong> {
        let at = self.at();
        let Some(Token::Word(name)) = self.take() else {
            return Err((at, format!("a name is expected: {}", NAMES.join(", "))));
        };
        let number = match name.as_str() {
            "service.answers" => return Ok(Node::Answers),
            "diag.class" => return self.class(),
            "diag.restart_helps" => return self.helps(),
            "diag.p" => Number::Certainty,
            "risk.p" => Number::Risk,
            "service.actions" => Number::ActionsOfService,
            "node.actions" => Number::ActionsOfNode,
            other => {
                return Err((
                    at,
                    format!("`{other}` is not known{}", super::did_you_mean(other, &NAMES)),
                ));
            }
        };
        let operator = self.operator()?;
        let at = self.at();
        match self.take() {
            Some(Token::Number(value)) => Ok(Node::Number {
                name: number,
                operator,
                value,
            }),
            _ => Err((at, format!("`{name}` is compared with a number, such as 0.8"))),
        }
    }

    fn class(&mut self) -> Result<Node, Wrong> {
        if self.word("in") {
            let expected = |at| (at, "a list is expected: [\"hang\", \"crash\"]".to_owned());
            if !self.sign("[") {
                return Err(expected(self.at()));
            }
            let mut of = vec![self.class_name()?];
            while self.sign(",") {
                of.push(self.class_name()?);
            }
            return if self.sign("]") {
                Ok(Node::Class { of, is: true })
            } else {
                Err(expected(self.at()))
            };
        }
        let is = self.equality("diag.class")?;
        Ok(Node::Class {
            of: vec![self.class_name()?],
            is,
        })
    }

    fn class_name(&mut self) -> Result<FaultClass, Wrong> {
        let at = self.at();
        let names: Vec<&str> = FaultClass::ALL.iter().map(|class| class.as_str()).collect();
        match self.take() {
            Some(Token::Text(text)) => FaultClass::ALL
                .into_iter()
                .find(|class| class.as_str() == text)
                .ok_or_else(|| {
                    let hint = super::did_you_mean(&text, &names);
                    (
                        at,
                        format!(
                            "\"{text}\" is no class of fault{hint}; there are {}",
                            names.join(", ")
                        ),
                    )
                }),
            _ => Err((at, "a class in quotes is expected, such as \"hang\"".to_owned())),
        }
    }

    fn helps(&mut self) -> Result<Node, Wrong> {
        let is = self.equality("diag.restart_helps")?;
        let at = self.at();
        match self.take() {
            Some(Token::Text(text)) => ANSWERS
                .into_iter()
                .find(|answer| *answer == text)
                .map(|answer| Node::Helps { answer, is })
                .ok_or((at, "it is \"yes\", \"no\" or \"unknown\"".to_owned())),
            _ => Err((at, "it is \"yes\", \"no\" or \"unknown\"".to_owned())),
        }
    }

    fn equality(&mut self, name: &str) -> Result<bool, Wrong> {
        let at = self.at();
        match self.operator()? {
            Operator::Equal => Ok(true),
            Operator::NotEqual => Ok(false),
            _ => Err((at, format!("`{name}` has no order: use == or !="))),
        }
    }

    fn operator(&mut self) -> Result<Operator, Wrong> {
        let at = self.at();
        match self.take() {
            Some(Token::Sign("==")) => Ok(Operator::Equal),
            Some(Token::Sign("!=")) => Ok(Operator::NotEqual),
            Some(Token::Sign("<")) => Ok(Operator::Less),
            Some(Token::Sign("<=")) => Ok(Operator::LessOrEqual),
            Some(Token::Sign(">")) => Ok(Operator::Greater),
            Some(Token::Sign(">=")) => Ok(Operator::GreaterOrEqual),
            _ => Err((at, "a comparison is expected: == != < <= > >=".to_owned())),
        }
    }

    fn at(&self) -> usize {
        self.tokens.get(self.next).map_or(self.end, |(at, _)| *at)
    }

    fn take(&mut self) -> Option<Token> {
        let token = self.tokens.get(self.next).map(|(_, token)| token.clone());
        self.next += usize::from(token.is_some());
        token
    }

    fn word(&mut self, wanted: &str) -> bool {
        let found = matches!(self.tokens.get(self.next), Some((_, Token::Word(word))) if word == wanted);
        self.next += usize::from(found);
        found
    }

    fn sign(&mut self, wanted: &str) -> bool {
        let found = matches!(self.tokens.get(self.next), Some((_, Token::Sign(sign))) if *sign == wanted);
        self.next += usize::from(found);
        found
    }
}

/// Longer ones first.
const SIGNS: [&str; 11] = ["==", "!=", "<=", ">=", "<", ">", "(", ")", "[", "]", ","];
/// Every name there is.
const NAMES: [&str; 7] = [
    "diag.class",
    "diag.p",
    "diag.restart_helps",
    "risk.p",
    "service.answers",
    "service.actions",
    "node.actions",
];
const ANSWERS: [&str; 3] = ["yes", "no", "unknown"];
const TEXT_MAX: usize = 1_024;
const TOKENS_MAX: usize = 128;
const DEPTH_MAX: usize = 16;
/// Numbers closer than this are equal.
const EQUAL: f64 = 1e-9;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn holds(text: &str, facts: &Facts) -> Option<bool> {
        Expression::parse(text)
            .unwrap_or_else(|error| panic!("{error}"))
            .holds(facts)
    }

    fn hang() -> Facts {
        Facts {
            class: FaultClass::Hang,
            certainty: 0.9,
            ..Facts::example()
        }
    }

    #[test]
    fn comparisons_and_their_joints_mean_what_they_say() {
        for (text, expected) in [
            ("diag.class == \"hang\"", true),
            ("diag.class != 'hang'", false),
            ("diag.class in ['crash', 'hang']", true),
            ("diag.p >= 0.9 and diag.p < 0.91", true),
            ("diag.p == 0.9 or diag.p > 5", true),
            ("not diag.p > 0.5", false),
            (
                "diag.class == 'crash' or diag.class == 'hang' and diag.p > 0.95",
                false,
            ),
            (
                "(diag.class == 'crash' or diag.class == 'hang') and diag.p > 0.5",
                true,
            ),
            ("diag.restart_helps == 'yes'", true),
            ("service.answers", false),
            ("service.actions <= 2 and node.actions != 7", true),
        ] {
            assert_eq!(holds(text, &hang()), Some(expected), "{text}");
        }
    }

    #[test]
    fn the_unknown_is_never_yes() {
        for text in [
            "risk.p > 0.5",
            "not risk.p > 0.5",
            "risk.p > 0.5 and diag.p > 0.5",
        ] {
            assert_eq!(holds(text, &hang()), None, "{text}");
        }
        assert_eq!(holds("risk.p > 0.5 or diag.p > 0.5", &hang()), Some(true));
        assert_eq!(holds("risk.p > 0.5 and diag.p > 0.95", &hang()), Some(false));
        let known = Facts {
            risk: Some(0.7),
            ..hang()
        };
        assert_eq!(holds("risk.p > 0.5", &known), Some(true));
    }

    #[test]
    fn what_cannot_be_is_refused_with_its_place_and_the_nearest_name() {
        for (text, at, words) in [
            ("diag.clas == 'hang'", 1, "did you mean `diag.class`?"),
            ("diag.class == 'hangs'", 15, "did you mean `hang`?"),
            ("diag.class < 'hang'", 12, "no order"),
            ("diag.p == 'hang'", 11, "a number"),
            ("diag.p", 7, "a comparison"),
            ("(diag.p > 1", 12, "`)` is missing"),
            ("diag.p > 1 diag.p > 2", 12, "one too many"),
            ("diag.class == 'hang", 15, "not closed"),
            ("diag.p > 1 ; 2", 12, "means nothing"),
            ("", 1, "a name is expected"),
            ("diag.restart_helps == 'maybe'", 23, "\"yes\""),
        ] {
            let error = Expression::parse(text).expect_err(text);
            assert_eq!(error.at, at, "{error}");
            assert!(error.to_string().contains(words), "{error}");
        }
    }

    #[test]
    fn size_and_depth_are_bounded() {
        let deep = format!("{}diag.p > 0{}", "(".repeat(40), ")".repeat(40));
        assert!(Expression::parse(&deep).unwrap_err().reason.contains("nested"));
        let long = vec!["diag.p > 0"; 60].join(" or ");
        assert!(Expression::parse(&long).is_err());
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "[a-z_.=<>!()\\[\\]'\", 0-9]{0,80}") {
            if let Ok(expression) = Expression::parse(&text) {
                expression.holds(&hang());
                prop_assert_eq!(Expression::parse(&expression.to_string()).unwrap(), expression);
            }
        }
    }
}
