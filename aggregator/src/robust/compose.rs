//! A rule with its pre-aggregations, from a name to values.

use super::bucketing::Bucketing;
use super::bulyan::Bulyan;
use super::centered_clipping::CenteredClipping;
use super::clipping::Clipping;
use super::geometric_median::GeometricMedian;
use super::gram::Gram;
use super::krum::{Krum, Neighbours};
use super::method::{Method, Plan, Round, Stage};
use super::mix::Mix;
use super::monna::Monna;
use super::name::{Base, Before};
use super::rows::{Rows, Scalar};
use super::trimmed_mean::TrimmedMean;
use super::{Combined, Detail, Options, RowEvidence, Rule, RuleError, RuleName, tiles};
use super::{
    arc::Arc, caf::Caf, dedup::Dedup, mda::Mda, meamed::Meamed, mean::Mean, median::Median, nnm::Nnm,
};

/// A checked chain of pre-aggregations and a rule, for an assumed number of hostile rows.
#[derive(Debug)]
pub struct Composed {
    name: RuleName,
    byzantine: usize,
    stages: Vec<Box<dyn Stage>>,
    method: Option<Box<dyn Method>>,
}

/// Rows made of rows.
#[derive(Debug, Clone, PartialEq)]
pub struct MixedRows<T> {
    /// `[count][d]`, row after row.
    pub values: Vec<T>,
    /// Number of rows.
    pub count: usize,
    /// The last seeded permutation that was drawn, if any.
    pub permutation: Option<Vec<usize>>,
}

/// Everything before the rule, done.
struct Prepared {
    mixes: Vec<Mix>,
    n: usize,
    f: usize,
    gram: Option<Gram>,
    permutation: Option<Vec<usize>>,
}

impl Composed {
    /// The rule called `name` that assumes `byzantine` hostile rows.
    ///
    /// # Errors
    /// [`Options::check`].
    pub fn new(name: RuleName, byzantine: usize, options: &Options) -> Result<Self, RuleError> {
        options.check(name)?;
        Ok(Self {
            name,
            byzantine,
            stages: name.before().map(|before| stage(before, options)).collect(),
            method: name.base().map(|base| method(base, options)).transpose()?,
        })
    }

    /// Values only, without the evidence about each row that a round's record keeps: cheaper for rules of coordinates.
    ///
    /// # Errors
    /// As [`Rule::combine`].
    pub fn values<T: Scalar>(&self, rows: &dyn Rows<T>) -> Result<Combined<T>, RuleError> {
        self.run(rows, Detail::Values)
    }

    /// Values and evidence.
    ///
    /// # Errors
    /// As [`Rule::combine`].
    pub fn explained<T: Scalar>(&self, rows: &dyn Rows<T>) -> Result<Combined<T>, RuleError> {
        self.run(rows, Detail::Evidence)
    }

    /// The rows that the pre-aggregations make, for a name without a rule.
    ///
    /// # Errors
    /// As [`Rule::combine`].
    pub fn mixed<T: Scalar>(&self, rows: &dyn Rows<T>) -> Result<MixedRows<T>, RuleError> {
        not_empty(rows)?;
        // Rows without a rule need no majority behind a bucketing: nothing is decided yet.
        super::minority(rows.count(), self.byzantine)?;
        let prepared = self.prepare(rows)?;
        let values = finite(tiles::mixed_rows(rows, &prepared.mixes))?;
        Ok(MixedRows {
            values,
            count: prepared.n,
            permutation: prepared.permutation,
        })
    }

    /// How many of `n` rows with `f` hostile ones the stages from `at` on leave.
    fn before(&self, at: usize, n: usize, f: usize) -> Result<usize, RuleError> {
        let mut left = n;
        for stage in &self.stages[at..] {
            stage.check(left, f)?;
            left = stage.rows_after(left);
        }
        Ok(left)
    }

    /// Whether the stages from `at` on and the rule take `n` rows with `f` hostile ones.
    fn rest(&self, at: usize, n: usize, f: usize) -> Result<(), RuleError> {
        super::minority(n, f)?;
        let left = self.before(at, n, f)?;
        match &self.method {
            Some(method) => method.check(left, self.name.withstands(f)),
            None => Ok(()),
        }
    }

    fn prepare<T: Scalar>(&self, rows: &dyn Rows<T>) -> Result<Prepared, RuleError> {
        let mut state = Prepared {
            mixes: Vec::new(),
            n: rows.count(),
            f: self.byzantine,
            gram: None,
            permutation: None,
        };
        let none = Gram::default();
        for (at, stage) in self.stages.iter().enumerate() {
            if stage.needs_gram() && state.gram.is_none() {
                state.gram = Some(Gram::of(rows, &state.mixes)?);
            }
            let round = Round {
                n: state.n,
                f: state.f,
                gram: state.gram.as_ref().unwrap_or(&none),
            };
            let mixed = stage.mix(round);
            if stage.removes() && self.rest(at + 1, mixed.mix.outputs(), mixed.f).is_err() {
                continue;
            }
            let later = self.stages[at + 1..].iter().any(|stage| stage.needs_gram())
                || self.method.as_ref().is_some_and(|method| method.needs_gram());
            state.gram = state.gram.filter(|_| later).map(|gram| gram.mixed(&mixed.mix));
            (state.n, state.f) = (mixed.mix.outputs(), mixed.f);
            state.permutation = mixed.permutation.or(state.permutation);
            state.mixes.push(mixed.mix);
        }
        Ok(state)
    }

    fn run<T: Scalar>(&self, rows: &dyn Rows<T>, detail: Detail) -> Result<Combined<T>, RuleError> {
        let Some(method) = &self.method else {
            return Err(RuleError::NoRule(self.name.to_string()));
        };
        not_empty(rows)?;
        self.check(rows.count())?;
        let mut prepared = self.prepare(rows)?;
        method.check(prepared.n, prepared.f)?;
        if method.needs_gram() && prepared.gram.is_none() {
            prepared.gram = Some(Gram::of(rows, &prepared.mixes)?);
        }
        let none = Gram::default();
        let gram = prepared.gram.as_ref().unwrap_or(&none);
        let plan = method.plan(Round {
            n: prepared.n,
            f: prepared.f,
            gram,
        })?;
        let (values, evidence, scores) = match plan {
            Plan::Weights { weights, scores } => {
                let weights = prepared
                    .mixes
                    .iter()
                    .rev()
                    .fold(weights, |weights, mix| mix.pull_back(&weights));
                let values = finite(tiles::weighted_sum(rows, &weights))?;
                let evidence = match detail {
                    Detail::Values => Vec::new(),
                    Detail::Evidence => about_rows(rows, &values, &weights),
                };
                (values, evidence, scores)
            }
            Plan::Columns { of, column } => {
                if let Some(of) = of {
                    let lists = of.into_iter().map(|row| vec![row]).collect();
                    prepared.mixes.push(Mix::means(lists, prepared.n));
                }
                let (values, evidence) = tiles::combine(rows, &prepared.mixes, column, detail);
                (finite(values)?, evidence, None)
            }
        };
        Ok(Combined {
            values,
            evidence,
            scores,
            permutation: prepared.permutation,
        })
    }
}

impl Rule for Composed {
    fn name(&self) -> RuleName {
        self.name
    }
    fn byzantine(&self) -> usize {
        self.byzantine
    }
    fn check(&self, n: usize) -> Result<(), RuleError> {
        let Some(method) = &self.method else {
            return Err(RuleError::NoRule(self.name.to_string()));
        };
        let f = self.name.withstands(self.byzantine);
        // What runs before a rule takes f also where the rule, a mean, takes none.
        method.check(self.before(0, n, self.byzantine)?, f)
    }
    fn combine(&self, rows: &dyn Rows<f32>) -> Result<Combined<f32>, RuleError> {
        self.explained(rows)
    }
    fn combine_f64(&self, rows: &dyn Rows<f64>) -> Result<Combined<f64>, RuleError> {
        self.explained(rows)
    }
}

fn stage(before: Before, options: &Options) -> Box<dyn Stage> {
    let size = options.bucket.unwrap_or(2).max(1);
    match before {
        Before::Nnm => Box::new(Nnm),
        Before::Clipping => Box::new(Clipping {
            norm: options.clip.unwrap_or(f64::INFINITY),
        }),
        Before::Arc => Box::new(Arc),
        Before::Bucketing => Box::new(Bucketing {
            size,
            seed: Some(options.seed.unwrap_or(0)),
        }),
        Before::BucketingIdentity => Box::new(Bucketing { size, seed: None }),
        Before::Dedup => Box::new(Dedup),
    }
}

fn method(base: Base, options: &Options) -> Result<Box<dyn Method>, RuleError> {
    let krum = |neighbours, keep| Box::new(Krum { neighbours, keep });
    let clipping = |calls| {
        let tau = options.tau.ok_or(RuleError::MissingOption {
            rule: base.word(),
            option: "tau",
        })?;
        Ok(Box::new(CenteredClipping {
            tau,
            passes: options.iterations.unwrap_or(1),
            calls,
        }))
    };
    Ok(match base {
        Base::Mean => Box::new(Mean),
        Base::Median => Box::new(Median),
        Base::TrimmedMean => Box::new(TrimmedMean),
        Base::Meamed => Box::new(Meamed),
        Base::Krum => krum(Neighbours::Mean, Some(1)),
        Base::MultiKrum => krum(Neighbours::Mean, options.keep),
        Base::KrumFlower => krum(Neighbours::Sum, Some(1)),
        Base::MultiKrumFlower => krum(Neighbours::Sum, options.keep),
        Base::GeometricMedian => Box::new(GeometricMedian {
            steps: options.iterations.unwrap_or(3),
            nu: options.nu.unwrap_or(0.1),
            converged: false,
        }),
        Base::GeometricMedianConverged => Box::new(GeometricMedian {
            steps: options.iterations.unwrap_or(2_000),
            nu: options.nu.unwrap_or(1e-9),
            converged: true,
        }),
        Base::CenteredClipping => clipping(1)?,
        Base::CenteredClippingTwoCalls => clipping(2)?,
        Base::Mda => Box::new(Mda),
        Base::Monna => Box::new(Monna {
            reference: options.reference.unwrap_or(0),
        }),
        Base::Caf => Box::new(Caf),
        Base::Bulyan => Box::new(Bulyan),
    })
}

/// What the record keeps about rows that were weighed: one without weight counts as outside in every coordinate.
fn about_rows<T: Scalar>(rows: &dyn Rows<T>, values: &[T], weights: &[f64]) -> Vec<RowEvidence> {
    tiles::norms_and_distances(rows, values)
        .into_iter()
        .zip(weights)
        .map(|((norm, distance), weight)| RowEvidence {
            norm,
            distance,
            trimmed_share: if *weight == 0.0 { 1.0 } else { 0.0 },
        })
        .collect()
}

fn not_empty<T: Scalar>(rows: &dyn Rows<T>) -> Result<(), RuleError> {
    match (rows.count(), rows.dimension()) {
        (0, _) => Err(RuleError::NoRows),
        (_, 0) => Err(RuleError::NoColumns),
        _ => Ok(()),
    }
}

fn finite<T: Scalar>(values: Vec<T>) -> Result<Vec<T>, RuleError> {
    let number = |value: &T| -> bool { Into::<f64>::into(*value).is_finite() };
    match values.iter().position(|value| !number(value)) {
        Some(index) => Err(RuleError::NonFinite { index }),
        None => Ok(values),
    }
}
