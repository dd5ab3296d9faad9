import com.eatthepath.pushy.apns.ApnsClient;
import com.eatthepath.pushy.apns.ApnsClientBuilder;
import com.eatthepath.pushy.apns.DeliveryPriority;
import com.eatthepath.pushy.apns.PushNotificationResponse;
import com.eatthepath.pushy.apns.PushType;
import com.eatthepath.pushy.apns.auth.ApnsSigningKey;
import com.eatthepath.pushy.apns.util.SimpleApnsPushNotification;
import java.io.File;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Instant;
import java.util.UUID;

/** The Java library Pushy. See ../contract.py for what it is told and tells. */
public final class Client {
  public static void main(String[] arguments) throws Exception {
    ApnsClientBuilder builder =
        new ApnsClientBuilder()
            .setApnsServer("localhost", Integer.parseInt(System.getenv("APPLE_PORT")))
            .setTrustedServerCertificateChain(new File(System.getenv("APPLE_CA")));
    if (System.getenv("APPLE_P12") != null) {
      builder.setClientCredentials(new File(System.getenv("APPLE_P12")), "");
    } else {
      builder.setSigningKey(
          ApnsSigningKey.loadFromPkcs8File(
              new File(System.getenv("APPLE_KEY_FILE")),
              System.getenv("APPLE_TEAM_ID"),
              System.getenv("APPLE_KEY_ID")));
    }
    ApnsClient client = builder.build();
    for (String line : System.getenv("APPLE_PUSHES").split("\n")) {
      String[] push = line.split(" ");
      PushNotificationResponse<SimpleApnsPushNotification> answer =
          client
              .sendNotification(
                  new SimpleApnsPushNotification(
                      push[1],
                      push[2],
                      Files.readString(Path.of(push[3])),
                      Instant.now().plusSeconds(60),
                      DeliveryPriority.IMMEDIATE,
                      PushType.ALERT,
                      null,
                      push[0].equals("-") ? null : UUID.fromString(push[0])))
              .get();
      System.out.printf(
          "{\"status\":%d,\"reason\":%s,\"timestamp\":%s,\"id\":\"%s\"}%n",
          answer.getStatusCode(),
          answer.getRejectionReason().map(reason -> '"' + reason + '"').orElse("null"),
          answer.getTokenInvalidationTimestamp().map(since -> "" + since.toEpochMilli()).orElse("null"),
          answer.getApnsId());
    }
    client.close().get();
  }
}
