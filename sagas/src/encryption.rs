//! Envelope encryption of payloads at rest. Each job has a data key of its own, which encrypts its payload and is itself
//! wrapped by a key-encryption key of the keyring; so keys are rotated by wrapping anew, without touching the data.
//!
//! XChaCha20-Poly1305 for both: its 192-bit nonces may be random however many jobs there are. Tenant, job and purpose are
//! authenticated along, so that what is sealed for one row opens in no other.

use std::{fmt, sync::Arc};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use chacha20poly1305::{
    KeyInit, XChaCha20Poly1305, XNonce,
    aead::{Aead, Payload},
};
use hmac::{Hmac, Mac};
use rand::RngCore;
use serde_json::{Value, json};
use uuid::Uuid;

type HmacSha256 = Hmac<sha2_hmac::Sha256>;

const NONCE: usize = 24;
const KEY: usize = 32;

/// Key-encryption keys that can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0}: what is needed is ID:KEY[,ID:KEY…], each KEY 32 bytes as base64 (`flotilla encryption new-key` makes one), each ID 1 to 64 characters of A-Z a-z 0-9 _ . -"
)]
pub struct InvalidKeys(String);

/// Why something sealed can't be read. Another worker may be able to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    /// The keyring lacks the key.
    #[error(
        "it is sealed with key {key:?}, which this process doesn't have (it has: {known}): add it to FLOTILLA_ENCRYPTION_KEYS"
    )]
    UnknownKey {
        /// The key it is sealed with.
        key: String,
        /// Those that are there.
        known: String,
    },
    /// The key is there and does not fit: another key under the same id, or a text from another row.
    #[error(
        "it does not open with key {key:?}: the key is another one under the same id, or the text was changed or moved here from another job"
    )]
    Refused {
        /// The key it is sealed with.
        key: String,
    },
}

/// What is sealed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// A job's request.
    Payload,
    /// A job's result.
    Result,
    /// A signal sent to a job.
    Signal,
}

impl Purpose {
    fn name(self) -> &'static str {
        match self {
            Self::Payload => "payload",
            Self::Result => "result",
            Self::Signal => "signal",
        }
    }
}

/// Whose it is; authenticated along.
#[derive(Debug, Clone, Copy)]
pub struct Owner<'a> {
    /// The tenant.
    pub tenant: &'a str,
    /// The job.
    pub job: Uuid,
    /// What of the job.
    pub purpose: Purpose,
}

impl Owner<'_> {
    /// Fields can't run into each other: tenants have no NUL, and the rest is of fixed form.
    fn bound(&self, what: &str) -> Vec<u8> {
        format!("flotilla/1\0{what}\0{}\0{}\0{}", self.purpose.name(), self.tenant, self.job).into_bytes()
    }
}

struct Key {
    id: String,
    wrap: XChaCha20Poly1305,
    fingerprint: [u8; 32],
}

/// Key-encryption keys; the first seals, all open.
pub struct Keyring(Vec<Key>);

impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Keyring").field(&self.ids()).finish()
    }
}

impl Keyring {
    /// Reads `ID:KEY,ID:KEY`; line breaks count as commas, so that a file may have one key a line.
    pub fn parse(text: &str) -> Result<Self, InvalidKeys> {
        let mut keys: Vec<Key> = vec![];
        for part in text.split([',', '\n', '\r']).map(str::trim).filter(|part| !part.is_empty()) {
            let (id, key) = part
                .split_once(':')
                .ok_or_else(|| InvalidKeys("a key without an id and a colon".to_owned()))?;
            let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
            if id.is_empty() || id.len() > 64 || !id.chars().all(allowed) {
                return Err(InvalidKeys(format!("the id {id:?} is not allowed")));
            }
            if keys.iter().any(|key| key.id == id) {
                return Err(InvalidKeys(format!("the id {id:?} stands there twice")));
            }
            // The key itself is never shown, not even a wrong one.
            let bytes = BASE64_STANDARD.decode(key.trim()).ok().filter(|bytes| bytes.len() == KEY);
            let bytes =
                bytes.ok_or_else(|| InvalidKeys(format!("the key of {id:?} is not 32 bytes of base64")))?;
            keys.push(Key::new(id, &bytes)?);
        }
        if keys.is_empty() {
            return Err(InvalidKeys("no key".to_owned()));
        }
        Ok(Self(keys))
    }

    /// The ids, the one that seals first.
    pub fn ids(&self) -> Vec<&str> {
        self.0.iter().map(|key| key.id.as_str()).collect()
    }

    fn current(&self) -> Option<&Key> {
        self.0.first()
    }

    fn get(&self, id: &str) -> Result<&Key, Unreadable> {
        self.0
            .iter()
            .find(|key| key.id == id)
            .ok_or_else(|| Unreadable::UnknownKey { key: id.to_owned(), known: self.ids().join(", ") })
    }
}

impl Key {
    fn new(id: &str, bytes: &[u8]) -> Result<Self, InvalidKeys> {
        let unusable = || InvalidKeys(format!("the key of {id:?} can't be used"));
        // One key for each use, derived by HMAC.
        let derived = |label: &[u8]| -> Result<[u8; 32], InvalidKeys> {
            let mut mac = <HmacSha256 as KeyInit>::new_from_slice(bytes).map_err(|_| unusable())?;
            mac.update(label);
            Ok(mac.finalize().into_bytes().into())
        };
        Ok(Self {
            id: id.to_owned(),
            wrap: XChaCha20Poly1305::new_from_slice(&derived(b"flotilla/1 wrap")?).map_err(|_| unusable())?,
            fingerprint: derived(b"flotilla/1 fingerprint")?,
        })
    }
}

/// A new key for `FLOTILLA_ENCRYPTION_KEYS`, as base64.
pub fn new_key() -> String {
    BASE64_STANDARD.encode(random::<KEY>())
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    // Cryptographic, and seeded by the system.
    rand::rng().fill_bytes(&mut bytes);
    bytes
}

/// Nonce and ciphertext as base64.
fn encrypt(cipher: &XChaCha20Poly1305, plain: &[u8], bound: &[u8]) -> Option<String> {
    let nonce = random::<NONCE>();
    let sealed = cipher.encrypt(&XNonce::from(nonce), Payload { msg: plain, aad: bound }).ok()?;
    Some(BASE64_STANDARD.encode([&nonce[..], &sealed].concat()))
}

fn decrypt(cipher: &XChaCha20Poly1305, text: &str, bound: &[u8]) -> Option<Vec<u8>> {
    let bytes = BASE64_STANDARD.decode(text).ok()?;
    let (nonce, sealed) = bytes.split_at_checked(NONCE)?;
    let nonce: [u8; NONCE] = nonce.try_into().ok()?;
    cipher.decrypt(&XNonce::from(nonce), Payload { msg: sealed, aad: bound }).ok()
}

/// Seals and opens what is at rest; without keys everything stays plain. Clones share the keys.
#[derive(Debug, Clone, Default)]
pub struct PayloadCipher(Option<Arc<Keyring>>);

impl From<Keyring> for PayloadCipher {
    fn from(keys: Keyring) -> Self {
        Self(Some(Arc::new(keys)))
    }
}

impl PayloadCipher {
    /// The id of the key that seals; `None`: nothing is sealed.
    pub fn current(&self) -> Option<&str> {
        Some(self.0.as_ref()?.current()?.id.as_str())
    }

    /// The ids of all keys.
    pub fn ids(&self) -> Vec<&str> {
        self.0.as_ref().map_or_else(Vec::new, |keys| keys.ids())
    }

    /// The value as it is stored, and the key's id. Without keys: the value itself.
    pub fn seal(&self, owner: Owner<'_>, value: &Value) -> Option<(Value, Option<String>)> {
        let Some(key) = self.0.as_ref().and_then(|keys| keys.current()) else {
            return Some((value.clone(), None));
        };
        let data_key = random::<KEY>();
        let data = XChaCha20Poly1305::new_from_slice(&data_key).ok()?;
        let sealed = json!({
            "key": encrypt(&key.wrap, &data_key, &owner.bound("key"))?,
            "data": encrypt(&data, value.to_string().as_bytes(), &owner.bound("data"))?,
        });
        Some((sealed, Some(key.id.clone())))
    }

    /// The value as it was sealed. With no key id it is plain.
    pub fn open(&self, owner: Owner<'_>, stored: Value, key_id: Option<&str>) -> Result<Value, Unreadable> {
        let Some(id) = key_id else { return Ok(stored) };
        let data_key = self.data_key(owner, &stored, id)?;
        let opened = || {
            let data = XChaCha20Poly1305::new_from_slice(&data_key).ok()?;
            let plain = decrypt(&data, stored.get("data")?.as_str()?, &owner.bound("data"))?;
            serde_json::from_slice(&plain).ok()
        };
        opened().ok_or_else(|| Unreadable::Refused { key: id.to_owned() })
    }

    /// The same with its data key wrapped by the current key; a plain value is sealed. `None`: nothing is to be done.
    pub fn rewrap(
        &self,
        owner: Owner<'_>,
        stored: &Value,
        key_id: Option<&str>,
    ) -> Result<Option<(Value, String)>, Unreadable> {
        let Some(current) = self.0.as_ref().and_then(|keys| keys.current()) else { return Ok(None) };
        let refused = || Unreadable::Refused { key: key_id.unwrap_or_default().to_owned() };
        let Some(id) = key_id else {
            let (sealed, _) = self.seal(owner, stored).ok_or_else(refused)?;
            return Ok(Some((sealed, current.id.clone())));
        };
        if id == current.id {
            return Ok(None);
        }
        let data_key = self.data_key(owner, stored, id)?;
        let wrapped = encrypt(&current.wrap, &data_key, &owner.bound("key")).ok_or_else(refused)?;
        let data = stored.get("data").ok_or_else(refused)?;
        Ok(Some((json!({ "key": wrapped, "data": data }), current.id.clone())))
    }

    fn data_key(&self, owner: Owner<'_>, stored: &Value, id: &str) -> Result<Vec<u8>, Unreadable> {
        let none = || Unreadable::UnknownKey { key: id.to_owned(), known: "none".to_owned() };
        let key = self.0.as_ref().ok_or_else(none)?.get(id)?;
        let text = stored.get("key").and_then(Value::as_str).unwrap_or_default();
        decrypt(&key.wrap, text, &owner.bound("key"))
            .ok_or_else(|| Unreadable::Refused { key: id.to_owned() })
    }

    /// What the same request always gives and tells nobody anything: with keys an HMAC, because a plain hash would show
    /// which payloads are equal, and guessable ones altogether.
    pub fn fingerprint(&self, request: &[u8]) -> Vec<u8> {
        self.fingerprints(request).swap_remove(0)
    }

    /// All fingerprints that the request may have been stored with: by each key, or before there were any.
    pub fn fingerprints(&self, request: &[u8]) -> Vec<Vec<u8>> {
        use sha2::Digest;
        let keys = self.0.iter().flat_map(|keys| &keys.0);
        keys.filter_map(|key| {
            let mut mac = <HmacSha256 as KeyInit>::new_from_slice(&key.fingerprint).ok()?;
            mac.update(request);
            Some(mac.finalize().into_bytes().to_vec())
        })
        .chain([sha2::Sha256::digest(request).to_vec()])
        .collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn cipher(ids: &[&str]) -> PayloadCipher {
        // The same id is the same key.
        let text: Vec<String> =
            ids.iter().map(|id| format!("{id}:{}", BASE64_STANDARD.encode([id.as_bytes()[0]; 32]))).collect();
        Keyring::parse(&text.join(",")).unwrap().into()
    }

    fn owner(tenant: &str, job: u128, purpose: Purpose) -> Owner<'_> {
        Owner { tenant, job: Uuid::from_u128(job), purpose }
    }

    #[test]
    fn what_is_sealed_opens_for_its_own_row_alone() {
        let cipher = cipher(&["a"]);
        let mine = owner("acme", 1, Purpose::Payload);
        let value = json!({ "secret": "swordfish" });
        let (sealed, key) = cipher.seal(mine, &value).unwrap();
        assert!(!sealed.to_string().contains("swordfish"));
        assert_ne!(cipher.seal(mine, &value).unwrap().0, sealed, "equal payloads must not look equal");
        assert_eq!(cipher.open(mine, sealed.clone(), key.as_deref()).unwrap(), value);
        for other in [
            owner("globex", 1, Purpose::Payload),
            owner("acme", 2, Purpose::Payload),
            owner("acme", 1, Purpose::Result),
        ] {
            let refused = cipher.open(other, sealed.clone(), key.as_deref());
            assert_eq!(refused, Err(Unreadable::Refused { key: "a".to_owned() }), "{other:?}");
        }
        // Half of it from another row of the same job.
        let (second, _) = cipher.seal(mine, &json!({})).unwrap();
        let mixed = json!({ "key": second["key"], "data": sealed["data"] });
        assert!(cipher.open(mine, mixed, key.as_deref()).is_err());
    }

    #[test]
    fn a_rotated_key_opens_what_the_old_one_sealed_and_wraps_it_anew() {
        let mine = owner("acme", 1, Purpose::Payload);
        let (sealed, _) = cipher(&["a"]).seal(mine, &json!({ "n": 1 })).unwrap();
        let both = cipher(&["b", "a"]);
        assert_eq!(both.current(), Some("b"));
        assert_eq!(both.open(mine, sealed.clone(), Some("a")).unwrap(), json!({ "n": 1 }));
        let (wrapped, id) = both.rewrap(mine, &sealed, Some("a")).unwrap().unwrap();
        assert_eq!(wrapped["data"], sealed["data"], "the data is not touched");
        assert_eq!(cipher(&["b"]).open(mine, wrapped, Some(&id)).unwrap(), json!({ "n": 1 }));
        let without = cipher(&["b"]).open(mine, sealed, Some("a")).unwrap_err();
        assert_eq!(without, Unreadable::UnknownKey { key: "a".to_owned(), known: "b".to_owned() });
    }

    #[test]
    fn without_keys_everything_stays_plain_and_sealed_things_say_so() {
        let mine = owner("acme", 1, Purpose::Payload);
        let off = PayloadCipher::default();
        assert_eq!(off.seal(mine, &json!({ "n": 1 })).unwrap(), (json!({ "n": 1 }), None));
        assert!(matches!(off.open(mine, json!({}), Some("a")), Err(Unreadable::UnknownKey { .. })));
        assert_eq!(off.fingerprint(b"x"), *cipher(&["a"]).fingerprints(b"x").last().unwrap());
    }

    #[test]
    fn fingerprints_tell_nothing_without_the_key_and_are_known_again_after_a_rotation() {
        let (old, new) = (cipher(&["a"]), cipher(&["b", "a"]));
        assert_ne!(old.fingerprint(b"x"), PayloadCipher::default().fingerprint(b"x"));
        assert_ne!(old.fingerprint(b"x"), new.fingerprint(b"x"));
        assert!(new.fingerprints(b"x").contains(&old.fingerprint(b"x")));
    }

    #[test]
    fn bad_keys_are_refused_without_being_shown() {
        for (text, said) in [
            ("", "no key"),
            ("a", "without an id"),
            ("a:c2hvcnQ=", "not 32 bytes"),
            ("a b:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=", "not allowed"),
        ] {
            let error = Keyring::parse(text).unwrap_err().to_string();
            assert!(error.contains(said) && !error.contains("c2hvcnQ"), "{error}");
        }
        let twice = format!("a:{0},a:{0}", new_key());
        assert!(Keyring::parse(&twice).unwrap_err().to_string().contains("twice"));
        let shown = format!("{:?}", Keyring::parse(&format!("# no\na:{}", new_key())));
        assert!(shown.starts_with("Err"), "{shown}");
    }
}
