//! Armed fault points, and what is told from their names.

use std::path::PathBuf;

/// Armed fault points whose firings are counted on their own, over all workers that carry them.
#[derive(Debug, Clone)]
pub struct Faults {
    /// As in `FLOTILLA_FAULTS`.
    pub spec: String,
    pub(crate) dir: PathBuf,
}

impl Faults {
    /// How often a point has acted.
    pub fn fired(&self, point: &str) -> usize {
        let mut times = 0;
        while self.dir.join(format!("{point}.{times}")).exists() {
            times += 1;
        }
        times
    }
}

/// A fault point together with the kind of job that comes by it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The job's kind.
    pub kind: String,
    /// The point's name.
    pub point: String,
    /// The point where the saga is to fail first, for places that are only met on the way back.
    pub fails_at: Option<String>,
}

impl Place {
    /// All places among these points: where several kinds share a point, one for each.
    pub fn all(points: &[String]) -> Vec<Self> {
        let kinds_of = |point: &str| -> Vec<String> {
            let kind = point.split('.').next().unwrap_or_default().to_owned();
            match kind.as_str() {
                "engine" => vec!["ingest".into(), "embed_document".into(), "probe".into()],
                "ingest" if point.ends_with(".inside") => vec![kind, "embed_document".into()],
                _ => vec![kind],
            }
        };
        let mut places: Vec<Self> = points
            .iter()
            .flat_map(|point| kinds_of(point).into_iter().map(move |kind| (kind, point)))
            .map(|(kind, point)| {
                let back = point.contains(".compensate.") || point == "engine.finish.inside";
                let fails_at = back.then(|| format!("{}.before", pivot(&kind, points)));
                Self { kind, point: point.clone(), fails_at }
            })
            .collect();
        places.sort();
        places
    }
}

/// The kind's step that can't be undone, as `kind.step`: the one without a fault point at its compensation.
fn pivot(kind: &str, points: &[String]) -> String {
    points
        .iter()
        .filter_map(|point| point.strip_suffix(".before"))
        .find(|step| {
            step.split('.').next() == Some(kind)
                && !step.ends_with(".compensate")
                && !points.contains(&format!("{step}.compensate.before"))
        })
        .unwrap_or_else(|| panic!("{kind} has no fault points: build with --features cli/faults"))
        .to_owned()
}
