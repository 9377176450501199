//! Every curve on one page, as SVG: what a figure costs over rules, prefixes, instances or flows.

use std::collections::BTreeMap;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use super::report::{Sample, Spread};

/// One chart's size, and how many stand side by side.
const CHART: (u32, u32) = (420, 260);
const COLUMNS: usize = 3;

/// A chart's figure and axis.
type Key<'a> = (&'a str, &'a str, &'a str, &'a str);
/// A variant's points.
type Lines<'a> = BTreeMap<&'a str, Vec<(f64, f64)>>;

/// The page.
pub fn page(samples: &[Sample]) -> Result<String> {
    let charts = charts(samples);
    let rows = charts.len().div_ceil(COLUMNS).max(1);
    let mut text = String::new();
    let size = (CHART.0 * COLUMNS as u32, CHART.1 * rows as u32);
    {
        let root = SVGBackend::with_string(&mut text, size).into_drawing_area();
        root.fill(&WHITE)?;
        for (area, ((section, figure, axis, unit), lines)) in root.split_evenly((rows, COLUMNS)).iter().zip(&charts) {
            chart(area, &format!("{section}: {figure}"), axis, unit, lines)
                .map_err(|error| anyhow!("{section}, {figure} can't be drawn: {error}"))?;
        }
        root.present()?;
    }
    Ok(text)
}

/// Figures with two points or more.
fn charts(samples: &[Sample]) -> Vec<(Key<'_>, Lines<'_>)> {
    let mut charts: Vec<(Key, Lines)> = Vec::new();
    for sample in samples {
        let (Some(axis), Some(at)) = (&sample.axis, sample.at) else { continue };
        let key = (&*sample.section, &*sample.figure, &**axis, &*sample.unit);
        let place = charts.iter().position(|(its, _)| *its == key).unwrap_or_else(|| {
            charts.push((key, Lines::new()));
            charts.len() - 1
        });
        charts[place].1.entry(&sample.variant).or_default().push((at, Spread::of(&sample.values).median));
    }
    charts.retain(|(_, lines)| lines.values().any(|points| points.len() > 1));
    charts
}

fn chart(
    area: &DrawingArea<SVGBackend, plotters::coord::Shift>,
    title: &str,
    axis: &str,
    unit: &str,
    lines: &Lines,
) -> Result<(), Box<dyn std::error::Error>> {
    let points = || lines.values().flatten();
    let least = points().map(|point| point.0).fold(f64::INFINITY, f64::min).max(1.0);
    let most = points().map(|point| point.0).fold(least * 10.0, f64::max);
    let top = points().map(|point| point.1).fold(0.0, f64::max).max(f64::MIN_POSITIVE) * 1.15;
    let mut chart = ChartBuilder::on(area)
        .margin(10)
        .caption(title, ("sans-serif", 14))
        .x_label_area_size(32)
        .y_label_area_size(48)
        .build_cartesian_2d((least..most).log_scale(), 0.0..top)?;
    chart.configure_mesh().disable_x_mesh().light_line_style(WHITE).x_desc(axis).y_desc(unit).draw()?;
    for (number, (variant, points)) in lines.iter().enumerate() {
        let color = Palette99::pick(number).to_rgba();
        let mut points = points.clone();
        points.sort_by(|one, other| one.0.total_cmp(&other.0));
        chart
            .draw_series(LineSeries::new(points, color.stroke_width(2)).point_size(3))?
            .label(*variant)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 14, y)], color));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .background_style(WHITE.mix(0.8))
        .draw()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_has_two_points_is_drawn() {
        let samples = [("curve", 1.0), ("curve", 1_000.0), ("point", 1.0)]
            .map(|(figure, at)| Sample::over_rules(figure, at, &[at]));
        let page = page(&samples).unwrap();
        assert!(page.starts_with("<svg") && page.trim_end().ends_with("</svg>"));
        assert!(page.contains("packet: curve") && !page.contains("packet: point"));
    }

    #[test]
    fn a_page_without_a_curve_is_one() {
        assert!(page(&[]).unwrap().starts_with("<svg"));
    }
}
