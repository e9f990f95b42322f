//! AdmissionReviews: what the API server asks about a pod, and the answer.
//!
//! Anybody in the cluster can send one. So of its megabytes no more is kept than is asked for here, whatever it consists of.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fmt;
use std::marker::PhantomData;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::de::{Deserializer, Error, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Name of the volume that is added.
const VOLUME: &str = "sluice-links";
/// Space for links; they are inodes only.
const SIZE_LIMIT: &str = "1Mi";
/// Variables that tell a sidecar of it.
const VARIABLES: [&str; 2] = ["SLUICE_LINKS", "SLUICE_LINKS_DIR"];
/// The container that QEMU runs in.
const COMPUTE: &str = "compute";
/// Names of hook sidecars start so.
const SIDECAR: &str = "hook-sidecar-";
/// Hook sidecars in one list of a pod, and the container that QEMU runs in.
const MAX_CONTAINERS: usize = 64;
/// The value of label `kubevirt.io` that KubeVirt gives the pods of VMs.
const LAUNCHER: &str = "virt-launcher";
/// Longest id of a review, in bytes. It is a UUID.
const MAX_UID: usize = 128;
/// Characters that are told of what is not understood.
const SHOWN: usize = 50;

/// An `AdmissionReview` of version `admission.k8s.io/v1`, with what is needed of it.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Review<'a> {
    #[serde(borrow)]
    api_version: Cow<'a, str>,
    #[serde(borrow)]
    request: Request<'a>,
}

#[derive(Deserialize)]
struct Request<'a> {
    #[serde(borrow)]
    uid: Cow<'a, str>,
    #[serde(borrow)]
    object: Option<Pod<'a>>,
}

#[derive(Deserialize)]
struct Pod<'a> {
    #[serde(borrow)]
    metadata: Option<Metadata<'a>>,
    spec: Option<Spec>,
}

#[derive(Deserialize)]
struct Metadata<'a> {
    #[serde(borrow)]
    labels: Option<Labels<'a>>,
}

#[derive(Deserialize)]
struct Labels<'a> {
    #[serde(borrow, default, rename = "kubevirt.io")]
    kubevirt: Cow<'a, str>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    volumes: Option<Names>,
    containers: Option<Containers>,
    init_containers: Option<Containers>,
}

/// Of a list of things with names, those that are ours.
#[derive(Default)]
struct Names(BTreeSet<&'static str>);

impl<'de> Deserialize<'de> for Names {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Named<'a> {
            #[serde(borrow, default)]
            name: Cow<'a, str>,
        }
        let mut names = Self::default();
        each(deserializer, |_, Named { name }| {
            names.0.extend([VOLUME, VARIABLES[0], VARIABLES[1]].into_iter().find(|ours| *ours == name));
            Ok(())
        })?;
        Ok(names)
    }
}

/// What is asked about a container.
struct Container {
    /// Its place in the list.
    place: usize,
    /// Or else QEMU's.
    is_sidecar: bool,
    mounts: Option<Names>,
    env: Option<Names>,
}

/// Of a list of containers, QEMU's and hook sidecars.
#[derive(Default)]
struct Containers(Vec<Container>);

impl<'de> Deserialize<'de> for Containers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Any<'a> {
            #[serde(borrow, default)]
            name: Cow<'a, str>,
            volume_mounts: Option<Names>,
            env: Option<Names>,
        }
        let mut all = Self::default();
        each(deserializer, |place, Any { name, volume_mounts, env }| {
            let is_sidecar = name.starts_with(SIDECAR);
            if is_sidecar || name == COMPUTE {
                all.0.push(Container { place, is_sidecar, mounts: volume_mounts, env });
            }
            if all.0.len() > MAX_CONTAINERS { Err("too many hook sidecars") } else { Ok(()) }
        })?;
        Ok(all)
    }
}

/// Shows each element of a list, with its place.
fn each<'de, D, T, F>(deserializer: D, show: F) -> Result<(), D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
    F: FnMut(usize, T) -> Result<(), &'static str>,
{
    struct Each<T, F>(F, PhantomData<T>);

    impl<'de, T, F> Visitor<'de> for Each<T, F>
    where
        T: Deserialize<'de>,
        F: FnMut(usize, T) -> Result<(), &'static str>,
    {
        type Value = ();

        fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            formatter.write_str("a list")
        }

        fn visit_seq<A: SeqAccess<'de>>(mut self, mut list: A) -> Result<(), A::Error> {
            let mut place = 0;
            while let Some(element) = list.next_element()? {
                (self.0)(place, element).map_err(A::Error::custom)?;
                place += 1;
            }
            Ok(())
        }
    }

    deserializer.deserialize_seq(Each(show, PhantomData))
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

/// Why a body is not an AdmissionReview. What it says is one short line, whatever the body is.
#[derive(Debug, thiserror::Error)]
pub enum ReviewError {
    /// Not the JSON of one.
    #[error("not an AdmissionReview: {:.200}", .0.to_string())]
    Json(#[from] serde_json::Error),
    /// Of another version.
    #[error("an AdmissionReview of version {0:?}, where only admission.k8s.io/v1 is understood")]
    Version(String),
    /// No id is that long.
    #[error("an AdmissionReview with a uid of {0} bytes")]
    Uid(usize),
}

/// Answers an AdmissionReview. Every pod is allowed; that of a VM gets the directory for links, at `dir`.
///
/// # Errors
/// [`ReviewError`], if there is nothing to answer.
pub fn answer(body: &[u8], dir: &str) -> Result<Answer, ReviewError> {
    let Review { api_version, request } = serde_json::from_slice(body)?;
    if api_version != "admission.k8s.io/v1" {
        return Err(ReviewError::Version(api_version.chars().take(SHOWN).collect()));
    }
    if request.uid.len() > MAX_UID {
        return Err(ReviewError::Uid(request.uid.len()));
    }
    let patch = request.object.map(|pod| patch(pod, dir)).unwrap_or_default();
    let encoded = (!patch.is_empty()).then(|| STANDARD.encode(Value::Array(patch).to_string()));
    let response = Response {
        uid: request.uid.into_owned(),
        allowed: true,
        patch_type: encoded.as_ref().map(|_| "JSONPatch"),
        patch: encoded,
    };
    Ok(Answer { api_version: "admission.k8s.io/v1", kind: "AdmissionReview", response })
}

/// What is missing in a pod, as operations of a JSON patch (RFC 6902). Nothing, if the pod is not that of a VM with hook
/// sidecars, or has it all.
fn patch(pod: Pod<'_>, dir: &str) -> Vec<Value> {
    let labels = pod.metadata.and_then(|metadata| metadata.labels);
    let is_vm = labels.is_some_and(|labels| labels.kubevirt == LAUNCHER);
    let mut spec = pod.spec.unwrap_or_default();
    let lists = [("containers", spec.containers.take()), ("initContainers", spec.init_containers.take())];
    let (mut sidecars, mut computes) = (Vec::new(), Vec::new());
    for (list, containers) in lists {
        for container in containers.unwrap_or_default().0 {
            let path = format!("/spec/{list}/{}", container.place);
            match container.is_sidecar {
                true => sidecars.push((path, container)),
                false if list == "containers" => computes.push((path, container)),
                false => {}
            }
        }
    }
    let mut patch = Vec::new();
    if !is_vm || sidecars.is_empty() {
        return patch;
    }
    let volume = json!({ "name": VOLUME, "emptyDir": { "sizeLimit": SIZE_LIMIT } });
    add(&mut patch, &mut spec.volumes, "/spec/volumes", VOLUME, volume);
    let mount = json!({ "name": VOLUME, "mountPath": dir });
    for (path, sidecar) in &mut sidecars {
        add(&mut patch, &mut sidecar.mounts, &format!("{path}/volumeMounts"), VOLUME, mount.clone());
        for (name, value) in VARIABLES.into_iter().zip(["shared", dir]) {
            let variable = json!({ "name": name, "value": value });
            add(&mut patch, &mut sidecar.env, &format!("{path}/env"), name, variable);
        }
    }
    // QEMU follows the links; it has no business with making any.
    let mount = json!({ "name": VOLUME, "mountPath": dir, "readOnly": true });
    for (path, compute) in &mut computes {
        add(&mut patch, &mut compute.mounts, &format!("{path}/volumeMounts"), VOLUME, mount.clone());
    }
    patch
}

/// Adds an entry to the list at `path`, unless one of its name is there. A list that is not there is made.
fn add(patch: &mut Vec<Value>, list: &mut Option<Names>, path: &str, name: &'static str, entry: Value) {
    let operation = match list {
        Some(list) if list.0.contains(name) => return,
        Some(_) => json!({ "op": "add", "path": format!("{path}/-"), "value": entry }),
        None => json!({ "op": "add", "path": path, "value": [entry] }),
    };
    patch.push(operation);
    list.get_or_insert_default().0.insert(name);
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
        for pod in [no_label, no_sidecar, json!({}), Value::Null, json!({ "spec": { "containers": null } })] {
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
    #[test]
    fn what_is_told_of_a_body_is_one_short_line() {
        let version = "v1\n".repeat(1 << 20);
        let reviews = [
            json!({ "apiVersion": version, "request": { "uid": "u" } }),
            json!({ "apiVersion": "admission.k8s.io/v1", "request": { "uid": version } }),
            json!({ "apiVersion": "admission.k8s.io/v1", "request": version }),
        ];
        for review in reviews {
            let told = answer(review.to_string().as_bytes(), DIR).unwrap_err().to_string();
            assert!(told.len() < 400 && !told.contains('\n'), "{told}");
        }
    }

    #[test]
    fn more_sidecars_than_there_can_be_are_refused() {
        let with = |count| {
            let sidecars: Vec<_> =
                (0..count).map(|number| json!({ "name": format!("hook-sidecar-{number}") })).collect();
            let pod = json!({ "metadata": launcher()["metadata"], "spec": { "containers": sidecars } });
            answer(&review(&pod), DIR)
        };
        assert!(with(MAX_CONTAINERS).is_ok());
        assert!(with(MAX_CONTAINERS + 1).unwrap_err().to_string().contains("too many hook sidecars"));
    }
}
