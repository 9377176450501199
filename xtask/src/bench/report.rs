//! What was measured, collected, compared and written: Markdown for people, JSON for programs.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::plot;
use super::runner::Build;

/// A line that the measurements print.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Line {
    /// Values of a figure, one a round.
    Sample(Sample),
    /// What was aimed at.
    Target(Target),
    /// Something to know.
    Note {
        /// Of which section.
        section: String,
        /// What.
        text: String,
    },
}

/// Values of a figure.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Sample {
    /// The section.
    pub section: String,
    /// What is measured.
    pub figure: String,
    /// Of whom, or in which variant.
    pub variant: String,
    /// In what.
    pub unit: String,
    /// Of a point of a curve: the axis, and where on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub axis: Option<String>,
    /// See `axis`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<f64>,
    /// One a round.
    pub values: Vec<f64>,
}

/// A ratio (or a figure) and where it has to stay.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Target {
    /// The section.
    pub section: String,
    /// What.
    pub what: String,
    /// One a round.
    pub values: Vec<f64>,
    /// Where it has to stay.
    pub bound: f64,
    /// Below, or above.
    pub at_most: bool,
}

impl Target {
    fn is_met(&self) -> bool {
        let median = Spread::of(&self.values).median;
        if self.at_most { median <= self.bound } else { median >= self.bound }
    }
}

/// Middle and quarters.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Spread {
    /// A quarter is below.
    pub low: f64,
    /// Half is.
    pub median: f64,
    /// Three quarters are.
    pub high: f64,
}

impl Spread {
    /// Of these values; not a number of none.
    pub fn of(values: &[f64]) -> Self {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let at = |part: f64| {
            let place = part * sorted.len().saturating_sub(1) as f64;
            let (below, above) = (sorted.get(place.floor() as usize), sorted.get(place.ceil() as usize));
            match (below, above) {
                (Some(below), Some(above)) => below + (above - below) * place.fract(),
                _ => f64::NAN,
            }
        };
        Self { low: at(0.25), median: at(0.5), high: at(0.75) }
    }

    fn text(&self) -> String {
        format!("{} ({} to {})", digits(self.median), digits(self.low), digits(self.high))
    }
}

/// Three digits that count.
fn digits(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// All of it.
#[derive(Serialize)]
pub struct Report {
    builds: Vec<String>,
    quick: bool,
    machine: Vec<String>,
    /// What each build measured.
    lines: Vec<Vec<Line>>,
}

impl Report {
    /// An empty one.
    pub fn new(builds: &[Build], quick: bool) -> Result<Self> {
        let names = builds.iter().map(|build| build.name.clone()).collect::<Vec<_>>();
        let lines = vec![Vec::new(); names.len()];
        Ok(Self { builds: names, quick, machine: machine()?, lines })
    }

    /// Notes how long all of it took.
    pub fn took(&mut self, time: Duration) {
        self.machine.push(format!("measured in {} minutes", digits(time.as_secs_f64() / 60.0)));
    }

    /// Adds what a build measured; what it measured in an earlier turn gets more values.
    pub fn add(&mut self, build: usize, lines: Vec<Line>) {
        for line in lines {
            let known = self.lines[build].iter_mut().find(|known| is_same(known, &line));
            match (known, line) {
                (Some(Line::Sample(known)), Line::Sample(more)) => known.values.extend(more.values),
                (Some(Line::Target(known)), Line::Target(more)) => known.values.extend(more.values),
                (Some(_), _) => {}
                (None, line) => self.lines[build].push(line),
            }
        }
    }

    /// For programs.
    pub fn json(&self) -> Result<String> {
        serde_json::to_string_pretty(self).context("a report can't be written as JSON")
    }

    /// The targets, for a terminal.
    pub fn summary(&self) -> String {
        let mut text = String::new();
        for target in self.targets() {
            let met = if target.is_met() { "met    " } else { "NOT MET" };
            let sign = if target.at_most { "<=" } else { ">=" };
            let spread = Spread::of(&target.values).text();
            // Writing to a string doesn't fail.
            let _ = writeln!(text, "{met}  {:<11} {}: {spread}, {sign} {}", target.section, target.what, target.bound);
        }
        let met = self.targets().filter(|target| target.is_met()).count();
        let _ = write!(text, "{met} of {} targets met", self.targets().count());
        if self.builds.len() > 1 {
            let _ = write!(text, "\n\n{}", self.comparison());
        }
        text
    }

    /// Everything, into a directory.
    pub fn write(&self, directory: &Path) -> Result<()> {
        let write = |name: &str, text: String| {
            let path = directory.join(name);
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
        };
        fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
        write("report.json", self.json()?)?;
        write("plots.svg", self.plots()?)?;
        write("report.md", format!("# Measurements\n\n{}", self.markdown("plots.svg")))
    }

    /// Puts figures and plots into the committed page.
    pub fn publish(&self, docs: &Path) -> Result<()> {
        let page = docs.join("performance.md");
        let text = fs::read_to_string(&page).with_context(|| format!("cannot read {}", page.display()))?;
        let text = replaced(&text, &self.markdown("performance.svg"))
            .with_context(|| format!("{} has no '{}' and '{}'", page.display(), MARKS.0, MARKS.1))?;
        fs::write(&page, text).with_context(|| format!("cannot write {}", page.display()))?;
        let plots = docs.join("performance.svg");
        fs::write(&plots, self.plots()?).with_context(|| format!("cannot write {}", plots.display()))
    }

    fn plots(&self) -> Result<String> {
        plot::page(&self.samples().cloned().collect::<Vec<_>>())
    }

    fn samples(&self) -> impl Iterator<Item = &Sample> {
        self.lines[0].iter().filter_map(|line| if let Line::Sample(sample) = line { Some(sample) } else { None })
    }

    fn targets(&self) -> impl Iterator<Item = &Target> {
        self.lines[0].iter().filter_map(|line| if let Line::Target(target) = line { Some(target) } else { None })
    }

    /// The report as a part of a page, whose plots are in this file.
    fn markdown(&self, plots: &str) -> String {
        let mut text = String::new();
        for line in &self.machine {
            let _ = writeln!(text, "- {line}");
        }
        if self.quick {
            text +=
                "- with `--quick`: few rounds, smaller sizes; what is aimed at for 1,000 instances isn't measured\n";
        }
        let met = self.targets().filter(|target| target.is_met()).count();
        let _ = write!(text, "\n### Targets\n\n{met} of {} are met.\n\n", self.targets().count());
        text += "| section | what | measured | target | |\n|---|---|---|---|---|\n";
        for target in self.targets() {
            let sign = if target.at_most { "at most" } else { "at least" };
            let met = if target.is_met() { "met" } else { "**not met**" };
            let spread = Spread::of(&target.values).text();
            let _ =
                writeln!(text, "| {} | {} | {spread} | {sign} {} | {met} |", target.section, target.what, target.bound);
        }
        if self.builds.len() > 1 {
            let _ = write!(text, "\n### {} beside {}\n\n{}", self.builds[0], self.builds[1], self.comparison());
        }
        let mut section = "";
        for sample in self.samples() {
            if sample.section != section {
                section = &sample.section;
                let _ = write!(text, "\n### {section}\n\n");
                for line in &self.lines[0] {
                    if let Line::Note { section: its, text: note } = line
                        && its == section
                    {
                        let _ = writeln!(text, "Note: {note}.\n");
                    }
                }
                text += "| figure | of | at | |\n|---|---|---|---|\n";
            }
            let Sample { figure, variant, unit, .. } = sample;
            let spread = Spread::of(&sample.values).text();
            let _ = writeln!(text, "| {figure} | {variant} | {} | {spread} {unit} |", place(sample));
        }
        text + &format!(
            "\n### How cost grows\n\n![Curves of every figure over rules, prefixes, instances and flows]({plots})\n"
        )
    }

    /// The first build's figures by the second's.
    fn comparison(&self) -> String {
        let mut text = format!(
            "| section | figure | of | at | {} / {} |\n|---|---|---|---|---|\n",
            self.builds[0], self.builds[1]
        );
        for sample in self.samples() {
            let other = self.lines[1].iter().find_map(|line| match line {
                Line::Sample(other) if is_same(&Line::Sample(sample.clone()), line) => Some(other),
                _ => None,
            });
            let Some(other) = other else { continue };
            let ratios: Vec<f64> = sample.values.iter().zip(&other.values).map(|(one, other)| one / other).collect();
            let Sample { section, figure, variant, .. } = sample;
            let spread = Spread::of(&ratios).text();
            let _ = writeln!(text, "| {section} | {figure} | {variant} | {} | {spread} |", place(sample));
        }
        text
    }
}

/// What stands around the figures in the committed page.
const MARKS: (&str, &str) =
    ("<!-- figures: written by cargo xtask bench --docs -->\n", "<!-- end of the figures -->\n");

/// The page with other figures; nothing where it has no place for them.
fn replaced(page: &str, figures: &str) -> Option<String> {
    let (before, rest) = page.split_once(MARKS.0)?;
    let (_, after) = rest.split_once(MARKS.1)?;
    Some(format!("{before}{}\n{figures}\n{}{after}", MARKS.0, MARKS.1))
}

fn place(sample: &Sample) -> String {
    match (&sample.axis, sample.at) {
        (Some(axis), Some(at)) => format!("{at} {axis}"),
        _ => String::new(),
    }
}

fn is_same(one: &Line, other: &Line) -> bool {
    match (one, other) {
        (Line::Sample(one), Line::Sample(other)) => {
            let key = |sample: &Sample| {
                (sample.section.clone(), sample.figure.clone(), sample.variant.clone(), sample.axis.clone())
            };
            key(one) == key(other) && one.at == other.at
        }
        (Line::Target(one), Line::Target(other)) => (&one.section, &one.what) == (&other.section, &other.what),
        (Line::Note { text: one, .. }, Line::Note { text: other, .. }) => one == other,
        _ => false,
    }
}

/// What a reader must know of the machine.
fn machine() -> Result<Vec<String>> {
    let read = |path: &str| fs::read_to_string(path).with_context(|| format!("cannot read {path}"));
    let processors = read("/proc/cpuinfo")?;
    let count = processors.lines().filter(|line| line.starts_with("processor")).count();
    let model = processors.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    let model = model.map_or("of an unknown model", |(_, model)| model.trim());
    let load = read("/proc/loadavg")?;
    let load = load.split(' ').next().unwrap_or_default().to_owned();
    Ok(vec![
        format!("Linux {}", read("/proc/sys/kernel/osrelease")?.trim()),
        format!("{count} processors, {model}"),
        format!("load average {load} when it began"),
    ])
}

#[cfg(test)]
impl Sample {
    /// A point of a curve over the number of rules.
    pub fn over_rules(figure: &str, at: f64, values: &[f64]) -> Self {
        Self {
            section: "packet".into(),
            figure: figure.into(),
            variant: "IPv4".into(),
            unit: "ns".into(),
            axis: Some("rules".into()),
            at: Some(at),
            values: values.to_vec(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(figure: &str, at: f64, values: &[f64]) -> Line {
        Line::Sample(Sample::over_rules(figure, at, values))
    }

    fn report(builds: &[&str]) -> Report {
        let builds: Vec<String> = builds.iter().map(|name| (*name).to_owned()).collect();
        let lines = vec![Vec::new(); builds.len()];
        Report { builds, quick: false, machine: Vec::new(), lines }
    }

    #[test]
    fn the_quarters_lie_between_values() {
        assert_eq!(Spread::of(&[5.0, 1.0, 3.0]), Spread { low: 2.0, median: 3.0, high: 4.0 });
        assert!(Spread::of(&[]).median.is_nan());
    }

    #[test]
    fn turns_are_put_together() {
        let mut report = report(&["this tree"]);
        report.add(0, vec![sample("new", 1.0, &[1.0]), sample("new", 60.0, &[2.0])]);
        report.add(0, vec![sample("new", 1.0, &[3.0])]);
        let values: Vec<Vec<f64>> = report.samples().map(|sample| sample.values.clone()).collect();
        assert_eq!(values, [vec![1.0, 3.0], vec![2.0]]);
    }

    #[test]
    fn a_target_is_met_by_its_median_alone() {
        let line = r#"{"kind":"target","section":"s","what":"w","values":[0.5,0.9,2.0],"bound":0.9,"at_most":true}"#;
        let mut report = report(&["this tree"]);
        report.add(0, vec![serde_json::from_str(line).unwrap()]);
        assert!(report.summary().starts_with("met "), "{}", report.summary());
        assert!(report.summary().ends_with("1 of 1 targets met"));
        report.add(0, vec![serde_json::from_str(&line.replace("[0.5,0.9,2.0]", "[2.0,2.0,2.0,2.0]")).unwrap()]);
        assert!(report.summary().starts_with("NOT MET"), "{}", report.summary());
    }

    #[test]
    fn figures_take_the_place_of_others() {
        let page = format!("before\n{}old\n{}after\n", MARKS.0, MARKS.1);
        let once = replaced(&page, "new").unwrap();
        assert!(once.starts_with("before\n") && once.ends_with("after\n") && !once.contains("old"), "{once}");
        assert_eq!(replaced(&once, "new").as_ref(), Some(&once));
        assert_eq!(replaced("no place", "new"), None);
    }

    #[test]
    fn revisions_are_compared_figure_by_figure() {
        let mut report = report(&["this tree", "v1"]);
        report.add(0, vec![sample("new", 1.0, &[2.0, 2.0]), sample("only here", 1.0, &[1.0])]);
        report.add(1, vec![sample("new", 1.0, &[1.0, 4.0])]);
        let comparison = report.comparison();
        assert!(comparison.contains("| new | IPv4 | 1 rules | 1.25 (0.88 to 1.62) |"), "{comparison}");
        assert!(!comparison.contains("only here"));
    }
}
