import com.notnoop.apns.APNS;
import com.notnoop.apns.ApnsDelegate;
import com.notnoop.apns.ApnsNotification;
import com.notnoop.apns.ApnsService;
import com.notnoop.apns.ApnsServiceBuilder;
import com.notnoop.apns.DeliveryError;
import com.notnoop.exceptions.ApnsDeliveryErrorException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Date;
import java.util.HexFormat;
import java.util.List;
import java.util.Map;
import java.util.concurrent.BlockingQueue;
import java.util.concurrent.LinkedBlockingQueue;
import java.util.concurrent.Semaphore;

/** The Java library of notnoop, java-apns. See ../contract.py for what it is told and tells. */
public final class Client {
  private static final Semaphore sentAgain = new Semaphore(0);
  private static final BlockingQueue<Integer> behind = new LinkedBlockingQueue<>();

  private static String env(String name) {
    return System.getenv("LEGACY_" + name);
  }

  private static final class Delegate implements ApnsDelegate {
    @Override
    public void messageSent(ApnsNotification message, boolean again) {
      if (again) sentAgain.release();
    }

    @Override
    public void messageSendFailed(ApnsNotification message, Throwable error) {
      int status = ((ApnsDeliveryErrorException) error).getDeliveryError().code();
      tellError(status, HexFormat.of().formatHex(message.getDeviceToken()));
    }

    @Override
    public void connectionClosed(DeliveryError error, int identifier) {}

    @Override
    public void cacheLengthExceeded(int length) {}

    @Override
    public void notificationsResent(int count) {
      behind.add(count);
    }
  }

  private static void tellError(int status, String token) {
    System.out.printf("{\"status\":%d,\"token\":\"%s\"}%n", status, token);
  }

  public static void main(String[] arguments) throws Exception {
    ApnsServiceBuilder builder =
        APNS.newService()
            .withCert(env("P12"), env("PASSPHRASE"))
            .withGatewayDestination("localhost", Integer.parseInt(env("PORT")))
            .withFeedbackDestination("localhost", Integer.parseInt(env("FEEDBACK_PORT")))
            .withDelegate(new Delegate());
    ApnsService service = builder.build();
    if (arguments[0].equals("feedback")) {
      for (Map.Entry<String, Date> each : service.getInactiveDevices().entrySet()) {
        System.out.printf(
            "{\"token\":\"%s\",\"at\":%d}%n",
            each.getKey().toLowerCase(), each.getValue().getTime() / 1000);
      }
      return;
    }
    List<String> lines = Files.readAllLines(Path.of(env("PUSHES")));
    for (String line : lines) {
      String[] push = line.split(" ", 5);
      service.push(push[3], push[4], new Date(Long.parseLong(push[1]) * 1000));
    }
    if (arguments[0].equals("careful")) {
      // After it has told of the error, it sends what was behind the one at fault by itself.
      sentAgain.acquire(behind.take());
    }
    service.stop();
  }
}
