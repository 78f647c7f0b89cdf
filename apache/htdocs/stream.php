<?php

/*
 * The endpoint of the chat page: checks the request, says where it is to be streamed, and is done.
 *
 * mod_socket_handoff sees X-Socket-Handoff, gives the client's connection and the data below to forkd, and this Apache
 * worker is free for the next request. forkd sends the cookies and CORS headers that were set here with its answer.
 */

declare(strict_types=1);

/** A header line may hold so much under mod_proxy_fcgi, which refuses those over 8 KB. */
const HEADER_MAX_BYTES = 7000;

function fail(int $status, string $code, string $error): never
{
    http_response_code($status);
    header('Content-Type: application/json');
    header('Cache-Control: no-store');
    $body = ['error' => $error, 'code' => $code];
    if (isset($_SERVER['UNIQUE_ID'])) {
        $body['request_id'] = $_SERVER['UNIQUE_ID'];
    }
    exit(json_encode($body));
}

/** What the page sent: a form by POST, JSON by POST, or a query by GET (all that EventSource can do). */
function input(): array
{
    if ($_SERVER['REQUEST_METHOD'] === 'GET') {
        return $_GET;
    }
    if (!str_starts_with(strtolower($_SERVER['CONTENT_TYPE'] ?? ''), 'application/json')) {
        if ($_POST === [] && $_FILES === [] && (int) ($_SERVER['CONTENT_LENGTH'] ?? 0) > 0) {
            fail(413, 'payload_too_large', 'The request is larger than post_max_size, or no form');
        }
        return $_POST;
    }
    $json = json_decode((string) file_get_contents('php://input'), true);
    if (!is_array($json)) {
        fail(400, 'bad_request', 'The body is not a JSON object');
    }
    return $json;
}

/** The conversation so far, [{"role": "user" or "assistant", "content": "…"}, …], which a form carries as JSON. */
function conversation(mixed $messages): array
{
    if (is_string($messages)) {
        $messages = $messages === '' ? [] : json_decode($messages, true);
    }
    if (!is_array($messages) || !array_is_list($messages)) {
        fail(400, 'bad_request', 'The messages are not a list');
    }
    return array_map(function (mixed $message): array {
        $role = $message['role'] ?? null;
        $content = $message['content'] ?? null;
        // Nobody but the application says what the system prompt is.
        if (!in_array($role, ['user', 'assistant'], true) || !is_string($content)) {
            fail(400, 'bad_request', 'A message has no role or no content');
        }
        return ['role' => $role, 'content' => $content];
    }, $messages);
}

if (!in_array($_SERVER['REQUEST_METHOD'], ['GET', 'POST'], true)) {
    header('Allow: GET, POST');
    fail(405, 'method_not_allowed', 'Use GET or POST');
}

// AUTHENTICATION GOES HERE, before anything that costs money:
//
//     session_start();
//     if (!isset($_SESSION['user_id'])) {
//         fail(401, 'unauthorized', 'Please sign in');
//     }
//     $user = $_SESSION['user_id'];
//     session_write_close();
//
// A POST wants a CSRF token too. A GET cannot carry one safely: without EventSource, allow POST alone.
//
// Until then a cookie tells visitors apart. It reaches the browser with forkd's answer, as a session's would.
$user = $_COOKIE['visitor'] ?? null;
if (!is_string($user) || !preg_match('/^[0-9a-f]{16}\z/', $user)) {
    $user = bin2hex(random_bytes(8));
    setcookie('visitor', $user, ['path' => '/', 'httponly' => true, 'samesite' => 'Lax']);
}

// For a page on another origin:
//
//     header('Access-Control-Allow-Origin: https://app.example.com');
//     header('Access-Control-Allow-Credentials: true');
//     header('Access-Control-Expose-Headers: X-Request-Id');
//     header('Vary: Origin');

$input = input();
$prompt = $input['prompt'] ?? null;
if (!is_string($prompt) || trim($prompt) === '') {
    fail(400, 'no_prompt', 'Please enter a prompt');
}
$data = ['prompt' => $prompt, 'user_id' => $user];
$messages = conversation($input['messages'] ?? []);
if ($messages !== []) {
    $data['messages'] = $messages;
}

// JSON in ASCII, on one line and without control characters, as a header must be; json_encode escapes all but DEL.
$json = json_encode($data, JSON_INVALID_UTF8_SUBSTITUTE);
if ($json === false) {
    fail(400, 'bad_request', 'The request is not valid');
}
$json = str_replace("\x7f", '\u007f', $json);

// `SetEnv FORKD_SOCKET /path` in Apache's configuration: mod_php and PHP-FPM both pass it on.
header('X-Socket-Handoff: ' . ($_SERVER['FORKD_SOCKET'] ?? (getenv('FORKD_SOCKET') ?: '/run/forkd/forkd.sock')));
if (strlen($json) <= HEADER_MAX_BYTES) {
    header('X-Handoff-Data: ' . $json);
} else {
    header('X-Handoff-Data-Source: body');
    echo $json;
}
