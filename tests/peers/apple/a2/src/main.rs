// The Rust library a2. See ../../contract.py for what it is told and tells.
use a2::request::payload::PayloadLike;
use a2::{Client, ClientConfig, Endpoint, Error, NotificationOptions, PushType};
use std::{env, fs};

fn told(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| panic!("{name} is not set"))
}

// A payload whose JSON is there already.
#[derive(Debug)]
struct Ready<'a> {
    token: &'a str,
    json: String,
    options: NotificationOptions<'a>,
}

impl serde::Serialize for Ready<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.json)
    }
}

impl PayloadLike for Ready<'_> {
    fn to_json_string(&self) -> Result<String, Error> {
        Ok(self.json.clone())
    }
    fn get_device_token(&self) -> &str {
        self.token
    }
    fn get_options(&self) -> &NotificationOptions<'_> {
        &self.options
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let key = fs::read(told("APPLE_KEY_FILE")).expect("the signing key is readable");
    let (key_id, team_id) = (told("APPLE_KEY_ID"), told("APPLE_TEAM_ID"));
    let client = Client::token(key.as_slice(), key_id, team_id, ClientConfig::new(Endpoint::Production))
        .expect("the signing key is good");
    for line in told("APPLE_PUSHES").lines() {
        let push: Vec<&str> = line.split(' ').collect();
        let options = NotificationOptions {
            apns_id: Some(push[0]).filter(|id| *id != "-"),
            apns_topic: Some(push[2]),
            apns_push_type: Some(PushType::Alert),
            ..Default::default()
        };
        let json = fs::read_to_string(push[3]).expect("the payload is readable");
        let answer = match client.send(Ready { token: push[1], json, options }).await {
            Ok(answer) | Err(Error::ResponseError(answer)) => answer,
            Err(error) => panic!("{error}"),
        };
        let reason = answer.error.as_ref().map(|error| format!("{:?}", error.reason));
        let timestamp = answer.error.as_ref().and_then(|error| error.timestamp);
        println!(
            "{}",
            serde_json::json!({"status": answer.code, "reason": reason, "timestamp": timestamp, "id": answer.apns_id})
        );
    }
}
