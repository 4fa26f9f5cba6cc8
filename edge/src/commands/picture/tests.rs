use std::time::Duration;

use theriac_model::detector::FitOptions;
use theriac_model::feature::FeatureSchema;

use super::*;

const STEP: Duration = Duration::from_mins(1);

/// Three swinging metrics; the second is lifted in the given rows.
fn rows(count: u16, lifted: Range<u16>) -> Vec<f32> {
    let row = |t: u16| {
        let swing = (f32::from(t) * 0.7).sin() * 0.1;
        let lift = if lifted.contains(&t) { 0.8 } else { 0.0 };
        [0.4 + swing, 0.5 - swing + lift, 0.3 + swing * swing]
    };
    (0..count).flat_map(row).collect()
}

fn drawn(series: &Series, times: bool) -> String {
    let mut schema = FeatureSchema::recorded("test", 3);
    schema.features[1].name = "queue <depth>".to_owned();
    let train = Series::new(3, rows(600, 0..0)).unwrap();
    let detector = Detector::fit(&schema, &train, &FitOptions::new(STEP)).unwrap();
    let explained = detector.explain_alarms(series).unwrap();
    let stamps: Vec<u64> = (0..series.rows() as u64)
        .map(|row| 1_706_710_000_000 + row * 60_000)
        .collect();
    let view = View {
        title: "shop.csv".to_owned(),
        detector: &detector,
        series,
        explained: &explained,
        clock: Clock::new(times.then_some(&stamps[..]), 60.0),
    };
    svg(&view).unwrap()
}

#[test]
fn shows_alarm_threshold_metrics_and_causes() {
    let series = Series::new(3, rows(600, 300..340)).unwrap();
    let picture = drawn(&series, true);
    assert!(picture.starts_with("<svg") && picture.trim_end().ends_with("</svg>"));
    for words in [
        "anomaly score",
        "highest alarm",
        "causes of the highest alarms",
        "queue &lt;depth&gt;",
        "2024-01-31 19:0",
        "time, UTC",
        "1 alarm",
        "▲",
    ] {
        assert!(picture.contains(words), "{words} is missing");
    }
}

#[test]
fn a_calm_recording_has_a_picture_without_a_close_up() {
    let picture = drawn(&Series::new(3, rows(600, 0..0)).unwrap(), false);
    assert!(picture.contains("no alarm") && picture.contains("time since the first row"));
    assert!(!picture.contains("highest alarm\n"));
}

#[test]
fn few_rows_missing_values_and_no_rows_are_drawn() {
    for values in [rows(1, 0..0), vec![f32::NAN; 300], Vec::new()] {
        let picture = drawn(&Series::new(3, values).unwrap(), true);
        assert!(picture.trim_end().ends_with("</svg>"));
        assert!(!picture.contains("NaN"), "{picture}");
    }
}

#[test]
fn a_month_of_minutes_stays_small() {
    let picture = drawn(&Series::new(3, rows(43_200, 30_000..30_100)).unwrap(), true);
    assert!(picture.len() < 600_000, "{} bytes", picture.len());
}
