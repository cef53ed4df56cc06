package io.github.tokenbroker.conformance;

import com.google.gson.Gson;
import com.google.gson.JsonArray;
import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import com.google.gson.JsonParser;
import io.github.tokenbroker.client.ErrorKind;
import io.github.tokenbroker.client.Report;
import io.github.tokenbroker.client.Token;
import io.github.tokenbroker.client.TokenBrokerException;
import io.github.tokenbroker.client.TokenClient;
import io.github.tokenbroker.client.okhttp.TokenInterceptor;
import io.github.tokenbroker.client.spring.TokenExchangeFilter;
import io.github.tokenbroker.client.spring.TokenRequestInterceptor;
import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStreamReader;
import java.io.PrintStream;
import java.net.http.HttpClient;
import java.nio.charset.StandardCharsets;
import java.nio.file.Path;
import java.time.Duration;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.TreeSet;
import java.util.concurrent.CancellationException;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.CompletionException;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.concurrent.atomic.AtomicLong;
import java.util.concurrent.atomic.LongAdder;
import java.util.logging.ConsoleHandler;
import java.util.logging.Level;
import java.util.logging.Logger;
import okhttp3.MediaType;
import okhttp3.OkHttpClient;
import okhttp3.RequestBody;
import okhttp3.Response;
import org.springframework.http.HttpMethod;
import org.springframework.http.client.JdkClientHttpRequestFactory;
import org.springframework.web.client.RestClient;
import org.springframework.web.reactive.function.client.WebClient;

/**
 * Drives the client in the conformance scenarios: JSON lines on standard input, answers on standard
 * output.
 */
public final class Driver {
  private static final Gson GSON = new Gson();

  /** Kept here, because a logger that nothing refers to forgets its level. */
  private static final Logger LOG = Logger.getLogger("io.github.tokenbroker");

  private final PrintStream out;
  private final ExecutorService threads =
      Executors.newCachedThreadPool(
          action -> {
            Thread thread = new Thread(action);
            thread.setDaemon(true);
            return thread;
          });
  private final Map<String, Opened> clients = new ConcurrentHashMap<>();
  private final Map<Long, CompletableFuture<Token>> calls = new ConcurrentHashMap<>();

  private Driver(PrintStream out) {
    this.out = out;
  }

  /** A client with the last things that it returned. */
  private static final class Opened {
    final TokenClient client;
    volatile Token lastToken;
    volatile Exception lastError;

    Opened(TokenClient client) {
      this.client = client;
    }
  }

  /**
   * Answers requests until standard input ends.
   *
   * @param arguments none
   * @throws IOException if standard input cannot be read
   */
  public static void main(String[] arguments) throws IOException {
    ConsoleHandler handler = new ConsoleHandler();
    handler.setLevel(Level.ALL);
    LOG.setLevel(Level.ALL);
    LOG.addHandler(handler);
    LOG.setUseParentHandlers(false);
    new Driver(new PrintStream(System.out, true, StandardCharsets.UTF_8)).run();
    System.exit(0);
  }

  private void run() throws IOException {
    BufferedReader in =
        new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
    for (String line = in.readLine(); line != null; line = in.readLine()) {
      JsonObject request = JsonParser.parseString(line).getAsJsonObject();
      // A call is registered before the next line is read, so that a `cancel` finds it.
      if (text(request, "op").equals("token")) {
        startToken(request);
      } else {
        threads.execute(() -> answer(request));
      }
    }
    clients.values().forEach(opened -> opened.client.close());
  }

  private void startToken(JsonObject request) {
    long id = request.get("id").getAsLong();
    try {
      Opened opened = opened(request);
      CompletableFuture<Token> call =
          opened.client.tokenAsync(text(request, "account"), timeout(request, opened));
      calls.put(id, call);
      call.whenCompleteAsync(
          (token, error) -> {
            calls.remove(id);
            write(request, error == null ? ok(shown(opened, token)) : failure(opened, error));
          },
          threads);
    } catch (TokenBrokerException error) {
      write(request, failure(null, error));
    }
  }

  private void answer(JsonObject request) {
    try {
      write(request, ok(handle(request)));
    } catch (Throwable error) {
      write(request, failure(null, error));
    }
  }

  private JsonElement handle(JsonObject request) throws Exception {
    return switch (text(request, "op")) {
      case "hello" -> hello();
      case "open" -> open(request);
      case "tokens" -> tokens(request);
      case "cancel" -> cancel(request);
      case "report" -> report(request);
      case "api" -> api(request);
      case "load" -> load(request);
      case "show" -> show(request);
      case "close" -> {
        opened(request).client.close();
        yield new JsonObject();
      }
      default -> throw new IllegalArgumentException("the driver has no such operation");
    };
  }

  /**
   * Answers once the classes of gRPC are loaded, which takes seconds on a busy machine. No scenario
   * measures that.
   */
  private static JsonElement hello() {
    try (TokenClient client = TokenClient.builder("http://127.0.0.1:1").build()) {
      client.token("nobody", Duration.ofMillis(200));
    } catch (TokenBrokerException expected) {
      // Nothing listens there.
    }
    return GSON.toJsonTree(
        Map.of("language", "java", "adapters", List.of("okhttp", "spring", "webclient")));
  }

  private JsonElement open(JsonObject request) {
    String[] endpoints =
        request.getAsJsonArray("endpoints").asList().stream()
            .map(JsonElement::getAsString)
            .toArray(String[]::new);
    TokenClient.Builder builder = TokenClient.builder(endpoints);
    builder.bearerFile(path(request, "bearer_file")).caFile(path(request, "ca_file"));
    builder.clientCertificate(path(request, "client_cert"), path(request, "client_key"));
    if (has(request, "timeout_ms")) {
      builder.timeout(Duration.ofMillis(request.get("timeout_ms").getAsLong()));
    }
    clients.put(text(request, "client"), new Opened(builder.build()));
    return new JsonObject();
  }

  private JsonElement tokens(JsonObject request) throws Exception {
    Opened opened = opened(request);
    List<Future<JsonElement>> results = new ArrayList<>();
    for (int i = 0; i < request.get("threads").getAsInt(); i++) {
      results.add(threads.submit(() -> tokenOrError(opened, request)));
    }
    JsonArray all = new JsonArray();
    for (Future<JsonElement> result : results) {
      all.add(result.get());
    }
    JsonObject answer = new JsonObject();
    answer.add("results", all);
    return answer;
  }

  private JsonElement tokenOrError(Opened opened, JsonObject request) {
    try {
      return shown(opened, opened.client.token(text(request, "account"), timeout(request, opened)));
    } catch (TokenBrokerException error) {
      return failure(opened, error);
    }
  }

  private JsonElement cancel(JsonObject request) {
    CompletableFuture<Token> call = calls.get(request.get("request").getAsLong());
    if (call != null) {
      call.cancel(true);
    }
    return new JsonObject();
  }

  private JsonElement report(JsonObject request) throws Exception {
    Opened opened = opened(request);
    Report report =
        opened
            .client
            .reportAsync(
                text(request, "account"),
                Long.parseUnsignedLong(text(request, "generation")),
                text(request, "upstream_code"),
                timeout(request, opened))
            .get();
    return GSON.toJsonTree(
        Map.of(
            "outcome", report.outcome().name(), "retry_after_ms", report.retryAfter().toMillis()));
  }

  private JsonElement api(JsonObject request) throws Exception {
    Opened opened = opened(request);
    TokenClient client = opened.client;
    Duration timeout = timeout(request, opened);
    String account = text(request, "account");
    String method = text(request, "method");
    String url = text(request, "url");
    String body = has(request, "body") ? text(request, "body") : null;
    return switch (text(request, "adapter")) {
      case "okhttp" -> okhttp(client, account, timeout, method, url, body);
      case "spring" -> spring(client, account, timeout, method, url, body);
      default -> webclient(client, account, timeout, method, url, body);
    };
  }

  private static JsonElement okhttp(
      TokenClient client, String account, Duration timeout, String method, String url, String body)
      throws IOException {
    OkHttpClient http =
        TokenInterceptor.addTo(new OkHttpClient.Builder(), client, account, timeout)
            .readTimeout(Duration.ofSeconds(60))
            .build();
    RequestBody content =
        body == null ? null : RequestBody.create(body, MediaType.get("text/plain"));
    okhttp3.Request request =
        new okhttp3.Request.Builder().url(url).method(method, content).build();
    try (Response response = http.newCall(request).execute()) {
      return answered(response.code(), response.body().string());
    } finally {
      http.connectionPool().evictAll();
      http.dispatcher().executorService().shutdown();
    }
  }

  private static JsonElement spring(
      TokenClient client,
      String account,
      Duration timeout,
      String method,
      String url,
      String body) {
    HttpClient http = HttpClient.newBuilder().followRedirects(HttpClient.Redirect.NEVER).build();
    RestClient rest =
        RestClient.builder()
            .requestFactory(new JdkClientHttpRequestFactory(http))
            .requestInterceptor(new TokenRequestInterceptor(client, account, timeout))
            .build();
    RestClient.RequestBodySpec spec = rest.method(HttpMethod.valueOf(method)).uri(url);
    if (body != null) {
      spec.body(body);
    }
    return spec.exchange(
        (sent, response) ->
            answered(
                response.getStatusCode().value(),
                new String(response.getBody().readAllBytes(), StandardCharsets.UTF_8)));
  }

  private static JsonElement webclient(
      TokenClient client,
      String account,
      Duration timeout,
      String method,
      String url,
      String body) {
    WebClient web =
        WebClient.builder().filter(new TokenExchangeFilter(client, account, timeout)).build();
    WebClient.RequestBodySpec spec = web.method(HttpMethod.valueOf(method)).uri(url);
    if (body != null) {
      spec.bodyValue(body);
    }
    return spec.exchangeToMono(
            response ->
                response
                    .bodyToMono(String.class)
                    .defaultIfEmpty("")
                    .map(text -> answered(response.statusCode().value(), text)))
        .block();
  }

  private static JsonElement answered(int status, String body) {
    return GSON.toJsonTree(Map.of("status", status, "body", body));
  }

  private JsonElement load(JsonObject request) throws Exception {
    Opened opened = opened(request);
    long end = System.nanoTime() + request.get("stop_after_ms").getAsLong() * 1_000_000;
    AtomicLong count = new AtomicLong();
    Map<String, LongAdder> errors = new ConcurrentHashMap<>();
    Set<String> generations = ConcurrentHashMap.newKeySet();
    List<Future<?>> callers = new ArrayList<>();
    for (int i = 0; i < request.get("threads").getAsInt(); i++) {
      callers.add(
          threads.submit(
              () -> {
                while (System.nanoTime() < end) {
                  count.incrementAndGet();
                  JsonObject result = tokenOrError(opened, request).getAsJsonObject();
                  if (result.has("error")) {
                    String kind = text(result.getAsJsonObject("error"), "kind");
                    errors.computeIfAbsent(kind, ignored -> new LongAdder()).increment();
                  } else {
                    generations.add(text(result, "generation"));
                  }
                  Thread.yield();
                }
              }));
    }
    for (Future<?> caller : callers) {
      caller.get();
    }
    JsonObject found = new JsonObject();
    errors.forEach((kind, number) -> found.addProperty(kind, number.sum()));
    JsonObject answer = new JsonObject();
    answer.addProperty("calls", count.get());
    answer.add("errors", found);
    answer.add("generations", GSON.toJsonTree(new TreeSet<>(generations)));
    return answer;
  }

  private JsonElement show(JsonObject request) {
    Opened opened = opened(request);
    JsonObject answer = new JsonObject();
    answer.addProperty("text", opened.client + "\n" + opened.lastToken + "\n" + opened.lastError);
    return answer;
  }

  private Opened opened(JsonObject request) {
    Opened opened = clients.get(text(request, "client"));
    if (opened == null) {
      throw new IllegalArgumentException("no such client is open");
    }
    return opened;
  }

  private static Duration timeout(JsonObject request, Opened opened) {
    return has(request, "timeout_ms")
        ? Duration.ofMillis(request.get("timeout_ms").getAsLong())
        : opened.client.timeout();
  }

  private static JsonElement shown(Opened opened, Token token) {
    opened.lastToken = token;
    JsonObject answer = new JsonObject();
    answer.addProperty("token", token.value());
    answer.addProperty("generation", Long.toUnsignedString(token.generation()));
    answer.addProperty("allowed_ip", token.allowedIp());
    answer.addProperty("api_base_url", token.apiBaseUrl());
    answer.addProperty("expires_in_ms", token.expiresIn().toMillis());
    return answer;
  }

  private static JsonObject ok(JsonElement value) {
    JsonObject answer = new JsonObject();
    answer.add("ok", value);
    return answer;
  }

  private static JsonObject failure(Opened opened, Throwable thrown) {
    JsonObject error = new JsonObject();
    Throwable cause = thrown;
    while (!(cause instanceof TokenBrokerException)
        && (cause instanceof CompletionException
            || cause instanceof ExecutionException
            || cause instanceof IOException)
        && cause.getCause() != null) {
      cause = cause.getCause();
    }
    if (cause instanceof TokenBrokerException known) {
      if (opened != null) {
        opened.lastError = known;
      }
      error.addProperty("kind", known.kind().name());
      known.code().ifPresent(code -> error.addProperty("code", code));
      known.reason().ifPresent(reason -> error.addProperty("reason", reason));
      known.upstreamCode().ifPresent(code -> error.addProperty("upstream_code", code));
      known.retryAfter().ifPresent(pause -> error.addProperty("retry_after_ms", pause.toMillis()));
    } else {
      ErrorKind kind =
          cause instanceof CancellationException
              ? ErrorKind.CANCELLED
              : cause instanceof IllegalArgumentException
                  ? ErrorKind.INVALID_ARGUMENT
                  : ErrorKind.INTERNAL;
      error.addProperty("kind", kind.name());
    }
    error.addProperty("message", String.valueOf(cause.getMessage()));
    JsonObject answer = new JsonObject();
    answer.add("error", error);
    return answer;
  }

  private void write(JsonObject request, JsonObject answer) {
    answer.add("id", request.get("id"));
    synchronized (out) {
      out.println(GSON.toJson(answer));
    }
  }

  private static boolean has(JsonObject request, String key) {
    return request.has(key) && !request.get(key).isJsonNull();
  }

  private static String text(JsonObject request, String key) {
    return request.get(key).getAsString();
  }

  private static Path path(JsonObject request, String key) {
    return has(request, key) ? Path.of(text(request, key)) : null;
  }
}
