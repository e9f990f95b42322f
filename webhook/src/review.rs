//! AdmissionReviews: what the API server asks about a pod, and the answer.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Name of the volume that is added.
const VOLUME: &str = "sluice-links";
/// Space for links; they are inodes only.
const SIZE_LIMIT: &str = "1Mi";
/// The container that QEMU runs in.
const COMPUTE: &str = "compute";
/// Names of hook sidecars start so.
const SIDECAR: &str = "hook-sidecar-";
/// The label, and its value, that KubeVirt gives the pods of VMs.
const LABEL: (&str, &str) = ("kubevirt.io", "virt-launcher");

/// An `AdmissionReview` of version `admission.k8s.io/v1`, with what is needed of it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Review {
    api_version: String,
    request: Request,
}

#[derive(Debug, Deserialize)]
struct Request {
    uid: String,
    #[serde(default)]
    object: Value,
}

/// The answer, as an `AdmissionReview` too.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Answer {
    api_version: &'static str,
    kind: &'static str,
    response: Response,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Response {
    uid: String,
    allowed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    patch_type: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    patch: Option<String>,
}

/// Why a body is not an AdmissionReview.
#[derive(Debug, thiserror::Error)]
pub enum ReviewError {
    /// Not the JSON of one.
    #[error("not an AdmissionReview: {0}")]
    Json(#[from] serde_json::Error),
    /// Of another version.
    #[error("an AdmissionReview of version '{0}', where only admission.k8s.io/v1 is understood")]
    Version(String),
}

/// Answers an AdmissionReview. Every pod is allowed; that of a VM gets the directory for links, at `dir`.
///
/// # Errors
/// [`ReviewError`], if there is nothing to answer.
pub fn answer(body: &[u8], dir: &str) -> Result<Answer, ReviewError> {
    let review: Review = serde_json::from_slice(body)?;
    if review.api_version != "admission.k8s.io/v1" {
        return Err(ReviewError::Version(review.api_version));
    }
    let patch = patch(&review.request.object, dir);
    let encoded = (!patch.is_empty()).then(|| STANDARD.encode(Value::Array(patch).to_string()));
    let response = Response {
        uid: review.request.uid,
        allowed: true,
        patch_type: encoded.as_ref().map(|_| "JSONPatch"),
        patch: encoded,
    };
    Ok(Answer { api_version: "admission.k8s.io/v1", kind: "AdmissionReview", response })
}

/// What is missing in a pod, as operations of a JSON patch (RFC 6902). Nothing, if the pod is not that of a VM with hook
/// sidecars, or has it all.
fn patch(pod: &Value, dir: &str) -> Vec<Value> {
    let is_vm = pod["metadata"]["labels"][LABEL.0] == LABEL.1;
    let sidecars = containers(pod, "containers").chain(containers(pod, "initContainers"));
    let sidecars: Vec<_> = sidecars.filter(|(_, container)| is_sidecar(container)).collect();
    let mut patch = Vec::new();
    if !is_vm || sidecars.is_empty() {
        return patch;
    }
    let volume = json!({ "name": VOLUME, "emptyDir": { "sizeLimit": SIZE_LIMIT } });
    add(&mut patch, pod["spec"]["volumes"].as_array(), "/spec/volumes", volume);
    let mount = json!({ "name": VOLUME, "mountPath": dir });
    let variables = [("SLUICE_LINKS", "shared"), ("SLUICE_LINKS_DIR", dir)];
    for (path, sidecar) in &sidecars {
        add(&mut patch, sidecar["volumeMounts"].as_array(), &format!("{path}/volumeMounts"), mount.clone());
        let mut present = sidecar["env"].as_array().cloned();
        for (name, value) in variables {
            let variable = json!({ "name": name, "value": value });
            if add(&mut patch, present.as_ref(), &format!("{path}/env"), variable.clone()) {
                present.get_or_insert_default().push(variable);
            }
        }
    }
    // QEMU follows the links; it has no business with making any.
    let mount = json!({ "name": VOLUME, "mountPath": dir, "readOnly": true });
    for (path, compute) in containers(pod, "containers").filter(|(_, container)| container["name"] == COMPUTE) {
        add(&mut patch, compute["volumeMounts"].as_array(), &format!("{path}/volumeMounts"), mount.clone());
    }
    patch
}

/// The containers in one of the pod's lists, each with its path.
fn containers<'a>(pod: &'a Value, list: &'static str) -> impl Iterator<Item = (String, &'a Value)> {
    let containers = pod["spec"][list].as_array().into_iter().flatten().enumerate();
    containers.map(move |(index, container)| (format!("/spec/{list}/{index}"), container))
}

fn is_sidecar(container: &Value) -> bool {
    container["name"].as_str().is_some_and(|name| name.starts_with(SIDECAR))
}

/// Adds an entry to the list at `path`, unless one of its name is there; whether it did. A list that is not there is made.
fn add(patch: &mut Vec<Value>, list: Option<&Vec<Value>>, path: &str, entry: Value) -> bool {
    let operation = match list {
        Some(list) if list.iter().any(|present| present["name"] == entry["name"]) => return false,
        Some(_) => json!({ "op": "add", "path": format!("{path}/-"), "value": entry }),
        None => json!({ "op": "add", "path": path, "value": [entry] }),
    };
    patch.push(operation);
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIR: &str = "/var/run/kubevirt/vhostuser";

    fn review(pod: &Value) -> Vec<u8> {
        let request = json!({ "uid": "u-1", "operation": "CREATE", "object": pod });
        json!({ "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request })
            .to_string()
            .into_bytes()
    }

    /// The pod as the API server would have it after the answer.
    fn patched(pod: &Value) -> Value {
        let answer = answer(&review(pod), DIR).unwrap();
        assert!(answer.response.allowed);
        assert_eq!(answer.response.uid, "u-1");
        let mut pod = pod.clone();
        if let Some(patch) = answer.response.patch {
            let patch: Vec<Value> = serde_json::from_slice(&STANDARD.decode(patch).unwrap()).unwrap();
            patch.iter().for_each(|operation| apply(&mut pod, operation));
        }
        pod
    }

    fn apply(pod: &mut Value, operation: &Value) {
        assert_eq!(operation["op"], "add");
        let (parent, key) = operation["path"].as_str().unwrap().rsplit_once('/').unwrap();
        let parent = pod.pointer_mut(parent).unwrap();
        match parent {
            Value::Array(list) if key == "-" => list.push(operation["value"].clone()),
            Value::Object(map) => assert!(map.insert(key.into(), operation["value"].clone()).is_none()),
            other => panic!("{operation} does not fit {other}"),
        }
    }

    fn launcher() -> Value {
        json!({
            "metadata": { "labels": { "kubevirt.io": "virt-launcher" } },
            "spec": {
                "containers": [
                    { "name": "compute", "volumeMounts": [{ "name": "private", "mountPath": "/p" }] },
                    { "name": "hook-sidecar-0" },
                    { "name": "hook-sidecar-1", "env": [{ "name": "SLUICE_LINKS", "value": "none" }] },
                    { "name": "other" },
                ],
                "volumes": [{ "name": "private", "emptyDir": {} }],
            },
        })
    }

    #[test]
    fn a_vm_gets_the_directory() {
        let pod = patched(&launcher());
        let [compute, first, second, other] = pod["spec"]["containers"].as_array().unwrap().as_slice() else {
            panic!("containers are lost")
        };
        assert_eq!(pod["spec"]["volumes"][1], json!({ "name": VOLUME, "emptyDir": { "sizeLimit": "1Mi" } }));
        let mount = json!({ "name": VOLUME, "mountPath": DIR, "readOnly": true });
        assert_eq!(compute["volumeMounts"], json!([{ "name": "private", "mountPath": "/p" }, mount]));
        assert_eq!(first["volumeMounts"], json!([{ "name": VOLUME, "mountPath": DIR }]));
        let (shared, dir) =
            (json!({ "name": "SLUICE_LINKS", "value": "shared" }), json!({ "name": "SLUICE_LINKS_DIR", "value": DIR }));
        assert_eq!(first["env"], json!([shared, dir]));
        // What somebody chose stays chosen.
        assert_eq!(second["env"], json!([{ "name": "SLUICE_LINKS", "value": "none" }, dir]));
        assert_eq!(*other, json!({ "name": "other" }));
        // The API server may call again after other webhooks.
        assert_eq!(patched(&pod), pod);
    }

    #[test]
    fn other_pods_are_left_alone() {
        let no_label = json!({ "metadata": {}, "spec": launcher()["spec"] });
        let no_sidecar =
            json!({ "metadata": launcher()["metadata"], "spec": { "containers": [{ "name": "compute" }] } });
        for pod in [no_label, no_sidecar, json!({}), Value::Null, json!([1]), json!({ "spec": { "containers": 3 } })] {
            assert_eq!(patched(&pod), pod);
        }
    }

    #[test]
    fn bodies_that_are_no_review_are_refused() {
        assert!(answer(b"", DIR).is_err());
        assert!(answer(b"{}", DIR).is_err());
        assert!(answer(br#"{"apiVersion":"admission.k8s.io/v1"}"#, DIR).is_err());
        let old = br#"{"apiVersion":"admission.k8s.io/v1beta1","request":{"uid":"u"}}"#;
        assert!(answer(old, DIR).unwrap_err().to_string().contains("only admission.k8s.io/v1"));
    }
}
