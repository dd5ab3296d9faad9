<?php
// The list of the feedback service. See ../contract.py for what it is told and tells.

$ctx = stream_context_create();
stream_context_set_option($ctx, 'ssl', 'local_cert', getenv('LEGACY_PEM'));
stream_context_set_option($ctx, 'ssl', 'passphrase', getenv('LEGACY_PASSPHRASE'));
$address = 'ssl://localhost:' . getenv('LEGACY_FEEDBACK_PORT');
$fp = stream_socket_client($address, $error, $errorString, 60, STREAM_CLIENT_CONNECT, $ctx);
if (!$fp) {
    exit("Failed to connect: $error $errorString" . PHP_EOL);
}
$content = '';
while (!feof($fp)) {
    $content .= fread($fp, 8192);
}
fclose($fp);
while (strlen($content) > 6) {
    $head = unpack('N1timestamp/n1length', substr($content, 0, 6));
    $token = unpack('H*', substr($content, 6, $head['length']));
    echo json_encode(array('token' => $token[1], 'at' => $head['timestamp'])), PHP_EOL;
    $content = substr($content, 6 + $head['length']);
}
