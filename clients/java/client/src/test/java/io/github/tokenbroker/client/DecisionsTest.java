package io.github.tokenbroker.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertNull;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.github.tokenbroker.client.Decisions.Decision;
import io.github.tokenbroker.client.Decisions.Knowledge;
import io.grpc.Metadata;
import io.grpc.Status;
import java.net.URI;
import java.nio.charset.StandardCharsets;
import java.nio.file.Path;
import java.time.Duration;
import java.util.List;
import java.util.Map;
import java.util.Optional;
import org.junit.jupiter.api.DisplayNameGeneration;
import org.junit.jupiter.api.DisplayNameGenerator.ReplaceUnderscores;
import org.junit.jupiter.api.Test;

@DisplayNameGeneration(ReplaceUnderscores.class)
class DecisionsTest {
  private static final long SECOND = 1_000_000_000;

  private static Kept kept(long generation, long reuseEnd, long end) {
    Token token = new Token("acme", "secret", generation, "", "https://api.example/v1", () -> 0);
    return new Kept(token, reuseEnd, end);
  }

  @Test
  void what_to_do_follows_from_the_kept_token_and_the_last_error() {
    Knowledge known = Knowledge.of(kept(1, 40 * SECOND, 60 * SECOND));
    assertEquals(Decision.USE, Decisions.decide(known, 40 * SECOND - 1));
    assertEquals(Decision.RENEW, Decisions.decide(known, 40 * SECOND));
    assertEquals(Decision.USE, Decisions.decide(known.pausedUntil(50 * SECOND), 50 * SECOND - 1));
    assertEquals(Decision.ASK, Decisions.decide(known.pausedUntil(70 * SECOND), 59 * SECOND));
    assertEquals(Decision.ASK, Decisions.decide(Knowledge.NOTHING, 0));
    Knowledge refused = Knowledge.refused(FakeBroker.error(ErrorKind.NOT_GRANTED).build(), SECOND);
    assertEquals(Decision.REFUSE, Decisions.decide(refused, SECOND - 1));
    assertEquals(Decision.ASK, Decisions.decide(refused, SECOND));
  }

  @Test
  void a_token_replaces_an_older_one_and_itself_if_it_may_be_kept_for_longer() {
    assertTrue(Decisions.replaces(kept(2, 1, 2 * SECOND), null, 0));
    assertTrue(Decisions.replaces(kept(2, 1, 2 * SECOND), kept(1, 5, 6 * SECOND), 0));
    assertTrue(Decisions.replaces(kept(2, 6, 7 * SECOND), kept(2, 5, 7 * SECOND), 0));
    assertFalse(Decisions.replaces(kept(2, 5, 7 * SECOND), kept(2, 5, 7 * SECOND), 0));
    assertFalse(Decisions.replaces(kept(1, 9, 9 * SECOND), kept(2, 5, 7 * SECOND), 0));
    assertTrue(
        Decisions.replaces(kept(-1, 1, 2 * SECOND), kept(1, 5, 6 * SECOND), 0),
        "generations are unsigned");
  }

  @Test
  void any_token_replaces_one_that_has_ended() {
    assertTrue(Decisions.replaces(kept(1, 9, 9 * SECOND), kept(2, 5, 7 * SECOND), 6 * SECOND));
  }

  @Test
  void pauses_double_up_to_a_limit_and_are_shortened_by_up_to_half() {
    assertEquals(SECOND / 10, Decisions.retryPause(1, 0));
    assertEquals(SECOND / 5, Decisions.retryPause(2, 0));
    assertEquals(SECOND, Decisions.retryPause(100, 0));
    assertEquals(30 * SECOND, Decisions.renewalPause(100, 0));
    assertEquals(10 * SECOND, Decisions.reopeningPause(100, 0));
    assertEquals(SECOND * 75 / 1000, Decisions.retryPause(1, 0.5));
  }

  @Test
  void the_kind_of_an_error_follows_from_the_status_and_the_reason() {
    assertEquals(
        ErrorKind.NOT_GRANTED, Errors.kindOf(Status.Code.PERMISSION_DENIED, "NOT_GRANTED"));
    assertEquals(
        ErrorKind.EGRESS_REJECTED,
        Errors.kindOf(Status.Code.FAILED_PRECONDITION, "EGRESS_REJECTED"));
    assertEquals(ErrorKind.INTERNAL, Errors.kindOf(Status.Code.FAILED_PRECONDITION, null));
    assertEquals(ErrorKind.INTERNAL, Errors.kindOf(Status.Code.CANCELLED, null));
  }

  @Test
  void a_reason_of_another_domain_is_left_out() {
    Metadata trailers = Status.trailersFromThrowable(WireBroker.refusal(9, "ACCOUNT_DISABLED"));
    TokenBrokerException error = Errors.from(Status.FAILED_PRECONDITION, trailers, "acme");
    assertEquals(Optional.of("ACCOUNT_DISABLED"), error.reason());
    trailers =
        Status.trailersFromThrowable(WireBroker.refusal(9, "ACCOUNT_DISABLED", "proxy.example"));
    error = Errors.from(Status.FAILED_PRECONDITION, trailers, "acme");
    assertEquals(Optional.empty(), error.reason());
    assertEquals(Optional.empty(), error.upstreamCode());
    assertEquals(ErrorKind.INTERNAL, error.kind());
  }

  private static Optional<String> code(int status, String body) {
    return RefusedToken.code(status, body.getBytes(StandardCharsets.UTF_8));
  }

  @Test
  void only_the_codes_of_a_refused_token_say_that_a_token_was_refused() {
    assertEquals(Optional.of("61003"), code(401, "{\"error\":{\"code\":\"61003\"}}"));
    assertEquals(Optional.of("61004"), code(400, "{\"error\":{\"code\":61004}}"));
    assertEquals(Optional.of("61003"), code(500, "{\"code\":\"61003\"}"));
    for (String body :
        List.of(
            "{\"error\":{\"code\":\"63001\"}}",
            "{\"error\":{\"message\":\"61003\"}}",
            "{\"error\":{\"code\":[61003]}}",
            "null",
            "61003",
            "",
            "{\"code\":\"61003\",\"text\":\"" + "x".repeat(65_536) + "\"}")) {
      assertEquals(Optional.empty(), code(401, body));
    }
    assertEquals(Optional.empty(), code(200, "{\"code\":\"61003\"}"));
  }

  @Test
  void a_token_goes_to_the_host_of_its_api_only() {
    Token token = kept(1, 0, 0).token();
    RefusedToken.checkHost(token, URI.create("https://API.example:443/other"));
    for (String url :
        List.of(
            "http://api.example/v1",
            "https://api.example:444/",
            "https://api.example.evil/",
            "x")) {
      TokenBrokerException error =
          assertThrows(
              TokenBrokerException.class, () -> RefusedToken.checkHost(token, URI.create(url)));
      assertEquals(ErrorKind.WRONG_HOST, error.kind());
    }
  }

  @Test
  void an_origin_has_the_scheme_the_host_and_the_port_in_one_form() {
    assertEquals("http://an_api:80", Origin.of(URI.create("HTTP://an_API/x")).toString());
    assertEquals("https://api:443", Origin.of(URI.create("https://user:word@api:/")).toString());
    assertEquals("https://[::1]:1", Origin.of(URI.create("https://[::1]:1/")).toString());
    for (String url : List.of("x", "mailto:x@y", "http://a@b@c_d/", "http://api:65536/")) {
      assertNull(Origin.of(URI.create(url)));
    }
  }

  @Test
  void settings_that_contradict_each_other_are_refused() {
    Path file = Path.of("file");
    for (TokenClient.Builder builder :
        List.of(
            TokenClient.builder(),
            TokenClient.builder("broker:50051"),
            TokenClient.builder("ftp://broker:1"),
            TokenClient.builder("http://user@127.0.0.1:1"),
            TokenClient.builder("http://user@a_broker:1"),
            TokenClient.builder("http://127.0.0.1"),
            TokenClient.builder("https://[::1]"),
            TokenClient.builder("https://broker:"),
            TokenClient.builder("http://127.0.0.1:0"),
            TokenClient.builder("http://127.0.0.1:65536"),
            TokenClient.builder("http://127.0.0.1:port"),
            TokenClient.builder("https://a_broker:1"),
            TokenClient.builder("http://127.0.0.1:1/path"),
            TokenClient.builder("http://127.0.0.1:1", "https://127.0.0.1:2"),
            TokenClient.builder("https://127.0.0.1:1").clientCertificate(file, null),
            TokenClient.builder("http://127.0.0.1:1").caFile(file),
            TokenClient.builder("http://broker.example:1").bearerFile(file),
            TokenClient.builder("http://[::ffff:128.0.0.1]:1").bearerFile(file),
            TokenClient.builder("http://[2001:db8::7f00:1]:1").bearerFile(file),
            TokenClient.builder("http://[localhost]:1").bearerFile(file),
            TokenClient.builder("http://127.0.0.1:1").timeout(Duration.ZERO))) {
      TokenBrokerException error =
          assertThrows(TokenBrokerException.class, () -> Settings.from(builder));
      assertEquals(ErrorKind.INVALID_ARGUMENT, error.kind());
    }
    for (String host : List.of("[::1]", "[::ffff:127.0.0.1]", "[::FFFF:7f01:203]", "127.1.2.3")) {
      Settings.from(TokenClient.builder("http://" + host + ":1").bearerFile(file));
    }
    Settings.from(
        TokenClient.builder("http://broker.example:1").bearerFile(file).allowPlaintextBearer());
    Settings.from(TokenClient.builder("HTTP://LOCALHOST:1/").bearerFile(file));
    assertEquals(
        List.of("http://a_broker:1", "http://broker:2"),
        Settings.from(TokenClient.builder("http://a_broker:1", "HTTP://Broker:2"))
            .endpoints()
            .stream()
            .map(Origin::toString)
            .toList());
  }

  @Test
  void settings_come_from_the_environment() {
    Map<String, String> environment =
        Map.of("TOKEN_BROKER_ENDPOINT", "http://localhost:1, http://127.0.0.1:2");
    try (TokenClient client = TokenClient.fromEnvironment(environment)) {
      assertTrue(client.toString().contains("http://localhost:1, http://127.0.0.1:2"));
    }
  }

  @Test
  void a_target_has_all_endpoints() {
    List<Origin> endpoints =
        List.of(new Origin("https", "a_b", 1), new Origin("https", "[::1]", 2));
    URI target = URI.create(EndpointResolver.target(endpoints));
    assertEquals("/a_b:1,[::1]:2", target.getPath());
  }

  @Test
  void the_text_of_a_token_does_not_contain_it() {
    Kept kept = kept(7, 0, 0);
    assertFalse((kept + " " + kept.token() + Knowledge.of(kept)).contains("secret"));
    assertTrue(kept.token().toString().contains("generation=7"));
  }
}
