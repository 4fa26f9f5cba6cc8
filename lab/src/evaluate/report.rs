//! The table for people.

use theriac_command::output::table;

use super::{Evaluation, Measures, PairedDifference};

/// Columns of the two tables with the headings that fit a terminal.
const RANKING: [(&str, &str); 8] = [
    ("vus_pr", "VUS-PR"),
    ("vus_roc", "VUS-ROC"),
    ("auc_pr", "AUC-PR"),
    ("auc_roc", "AUC-ROC"),
    ("oracle_f1", "oracle F1"),
    ("oracle_range_f1", "oracle range F1"),
    ("oracle_affil_f1", "oracle affil F1"),
    ("MISLEADING_pa_f1", "MISLEADING pa F1"),
];
const ALARMS: [(&str, [&str; 4]); 3] = [
    (
        "bud",
        ["bud_event_recall", "bud_fa_per_day", "bud_delay_s", "bud_f1"],
    ),
    ("op", ["op_event_recall", "op_fa_per_day", "op_delay_s", "op_f1"]),
    (
        "alarm",
        [
            "alarm_event_recall",
            "alarm_fa_per_day",
            "alarm_delay_s",
            "alarm_f1",
        ],
    ),
];

impl Evaluation {
    /// Every measure in tables of at most 14 columns, then what was left out.
    pub fn table(&self) -> String {
        let mut parts = vec![self.ranking(), self.alarms()];
        if !self.paired.is_empty() {
            parts.push(self.differences());
        }
        parts.extend(self.notes());
        parts.join("\n\n")
    }

    fn ranking(&self) -> String {
        let header: Vec<&str> = ["machine", "events", "rate"]
            .into_iter()
            .chain(RANKING.map(|(_, heading)| heading))
            .collect();
        let rows = self.rows(|measures| {
            let mut cells = vec![
                format!("{:.0}", measures.get("anomalies").unwrap_or(f64::NAN)),
                number(measures.get("rate")),
            ];
            cells.extend(RANKING.map(|(name, _)| number(measures.get(name))));
            cells
        });
        table(&header, &rows)
    }

    fn alarms(&self) -> String {
        let shown: Vec<_> = ALARMS
            .iter()
            .filter(|(_, names)| self.mean.get(names[0]).is_some())
            .collect();
        let headings: Vec<String> = shown
            .iter()
            .flat_map(|(prefix, _)| {
                ["recall", "FA/day", "delay s", "F1"].map(|what| format!("{prefix} {what}"))
            })
            .collect();
        let share = self.mean.get("alarm_quiet_share").map(|_| "quiet time in alarm");
        let header: Vec<&str> = std::iter::once("machine")
            .chain(headings.iter().map(String::as_str))
            .chain(share)
            .collect();
        let rows = self.rows(|measures| {
            let cells = shown.iter().flat_map(|(_, [recall, fa, delay, f1])| {
                let delay = measures.get(delay).filter(|delay| !delay.is_nan());
                [
                    number(measures.get(recall)),
                    number(measures.get(fa)),
                    delay.map_or("-".to_owned(), |delay| format!("{delay:.0}")),
                    number(measures.get(f1)),
                ]
            });
            let share = measures.get("alarm_quiet_share").map(|share| number(Some(share)));
            cells.chain(share).collect()
        });
        table(&header, &rows)
    }

    fn rows(&self, cells: impl Fn(&Measures) -> Vec<String>) -> Vec<Vec<String>> {
        let mean = (format!("MEAN of {}", self.machines.len()), &self.mean);
        self.machines
            .iter()
            .map(|machine| (machine.name.clone(), &machine.measures))
            .chain([mean])
            .map(|(name, measures)| std::iter::once(name).chain(cells(measures)).collect())
            .collect()
    }

    fn differences(&self) -> String {
        let row = |found: &PairedDifference| {
            let (name, difference) = &found.worst;
            vec![
                found.measure.to_owned(),
                format!("{:+.3}", found.mean),
                format!("[{:+.3}, {:+.3}]", found.low, found.high),
                format!("{} of {}", found.wins, found.machines),
                found.losses.to_string(),
                format!("{difference:+.3} {name}"),
            ]
        };
        let rows: Vec<_> = self.paired.iter().map(row).collect();
        let header = [
            "paired difference",
            "mean",
            "90 % bootstrap",
            "won",
            "lost",
            "worst",
        ];
        table(&header, &rows)
    }

    fn notes(&self) -> Option<String> {
        let mut lines = Vec::new();
        if let Some(worst) = self.worst_alarm_fa_per_day {
            lines.push(format!("worst machine's alarms: {worst:.2} false ones a day"));
        }
        if !self.missing.is_empty() {
            lines.push(format!("no scores for: {}", self.missing.join(", ")));
        }
        if !self.without_anomaly.is_empty() {
            let names = self.without_anomaly.join(", ");
            lines.push(format!("no anomaly in the labels, left out: {names}"));
        }
        if !self.absent.is_empty() {
            let paths: Vec<_> = self
                .absent
                .iter()
                .map(|path| format!("{}.npy", path.display()))
                .collect();
            lines.push(format!("not there, so left out: {}", paths.join(", ")));
        }
        (!lines.is_empty()).then(|| lines.join("\n"))
    }
}

fn number(value: Option<f64>) -> String {
    match value {
        Some(value) if !value.is_nan() => format!("{value:.3}"),
        _ => "-".to_owned(),
    }
}
